"""What a run minimizes, where that is not the model's own loss: cross entropy with smoothed labels.

    CE = 1/N sum_i  -(1 - eps) log p_i(y_i) - eps/C sum_c log p_i(c)

over the N labels y_i of all accumulated batches, with C classes and eps = label_smoothing_factor (Szegedy et al. 2016,
arXiv 1512.00567, section 7). In evaluation it is the plain cross entropy (eps = 0), so that runs can be compared.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # PyTorch's label of what no loss is of


@dataclass(frozen=True)
class Objective:
    smoothing: float = 0.0  # eps

    def count(self, labels: Tensor) -> Tensor:
        """N: what of a loss's sum the labels are."""
        return labels.ne(IGNORED).sum()

    def loss(self, logits: Tensor, labels: Tensor, items: Tensor | int, training: bool) -> Tensor:
        """CE of logits (..., C) for labels (...), `items` being the N of all accumulated batches."""
        smoothing = self.smoothing if training else 0.0
        total = F.cross_entropy(
            logits.flatten(0, -2).float(), labels.flatten(), reduction="sum", label_smoothing=smoothing
        )
        return total / items
