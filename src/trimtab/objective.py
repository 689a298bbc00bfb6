"""What a run minimizes, where that is not the model's own loss: cross entropy with smoothed labels, weighted classes.

    CE = 1/N sum_i  -(1 - eps) w(y_i) log p_i(y_i) - eps/C sum_c w(c) log p_i(c),    N = sum_i w(y_i)

over the labels y_i of all accumulated batches, as PyTorch's `cross_entropy`: C classes, eps = label_smoothing_factor
(Szegedy et al. 2016, arXiv 1512.00567, section 7), w = class_weights. "balanced" is w(c) = n / (C n_c) with n_c of the
n training labels (King and Zeng 2001, and scikit-learn's word for it). In evaluation it is the plain cross entropy
(eps = 0, w = 1), so that runs can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ConfigError, did_you_mean

IGNORED = -100  # PyTorch's label of what no loss is of


@dataclass(frozen=True)
class Objective:
    smoothing: float = 0.0  # eps
    weights: Tensor | None = None  # (C,)

    def count(self, labels: Tensor) -> Tensor:
        """N of these labels (...)."""
        learned = labels[labels != IGNORED]
        return torch.tensor(len(learned)) if self.weights is None else self.weights.to(labels.device)[learned].sum()

    def loss(self, logits: Tensor, labels: Tensor, items: Tensor | int) -> Tensor:
        """CE of logits (..., C) for labels (...), `items` being N."""
        weights = None if self.weights is None else self.weights.to(logits.device)
        total = F.cross_entropy(
            logits.flatten(0, -2).float(), labels.flatten(), weights, reduction="sum", label_smoothing=self.smoothing
        )
        return total / items


def class_weights(wanted: Literal["balanced"] | dict[str, float], names: Sequence[str], found: Any) -> Tensor:
    """w (C,) of the classes of these names; `found` are the labels of the training rows, numbers or lists of them.

    A class that is not named has the weight 1. Raises: ConfigError, for a name that no class has.
    """
    if wanted != "balanced":
        for name in wanted:
            if name not in names:
                raise ConfigError(f"training.class_weights: there is no label {name!r}.{did_you_mean(name, names)}")
        return torch.tensor([wanted.get(name, 1.0) for name in names])
    labels = torch.cat([torch.as_tensor(row).flatten() for row in found])
    counts = torch.bincount(labels[labels != IGNORED], minlength=len(names))
    return counts.sum() / (len(names) * counts.clamp(min=1))
