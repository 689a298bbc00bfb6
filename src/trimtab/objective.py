"""What a run minimizes, where that is not the model's own loss: smoothed labels, weighted classes, a teacher.

Over the labels y_i of all accumulated batches, with C classes, p_i the model's probabilities, and N = sum_i w(y_i):

    CE = 1/N sum_i  -(1 - eps) w(y_i) log p_i(y_i) - eps/C sum_c w(c) log p_i(c)

as PyTorch's `cross_entropy`: eps = label_smoothing_factor (Szegedy et al. 2016, arXiv 1512.00567, section 7), w =
class_weights. "balanced" is w(c) = n / (C n_c) with n_c of the n training labels (King and Zeng 2001, and
scikit-learn's word for it).

Distillation (Hinton et al. 2015, arXiv 1503.02531): with q_i the teacher's probabilities, both softened by T, that is
softmax(z / T) of logits z, and a the weight of the teacher,

    L = (1 - a) CE + a T^2/N sum_i w(y_i) KL(q_i || p_i)

T^2 keeps the gradient's size whatever T is (section 2 there). In evaluation the loss is the plain cross entropy
(eps = 0, w = 1, a = 0), so that runs can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from .errors import ConfigError, did_you_mean
from .targets import takes
from .tasks.token_classification import IGNORED

OBJECTIVES = ("class_weights", "distillation", "label_smoothing_factor")  # the keys of training that are about this


class Distillation(BaseModel):
    """teacher: a model's folder or hub id, or the folder of a run. temperature: T. weight: a."""

    model_config = ConfigDict(extra="forbid", strict=True)

    teacher: str
    temperature: float = Field(2.0, gt=0)
    weight: float = Field(0.5, gt=0, le=1)


@dataclass(frozen=True)
class Teacher:
    """A model in evaluation mode, and which of its classes are the student's, in their order."""

    settings: Distillation
    model: Any
    order: list[int] | None = None

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Its logits (..., C) for what the student reads, labels left out."""
        known = {name: value for name, value in batch.items() if name != "labels" and takes(self.model, name)}
        with torch.no_grad():
            found: Tensor = self.model(**known).logits
        return found if self.order is None else found[..., self.order]

    def divergence(self, logits: Tensor, taught: Tensor) -> Tensor:
        """T^2 KL (n,) of the student's logits (n, C) and the teacher's; padding of one's vocabulary is left out."""
        size, T = min(logits.shape[-1], taught.shape[-1]), self.settings.temperature
        own, theirs = ((found[:, :size].float() / T).log_softmax(-1) for found in (logits, taught))
        return T**2 * F.kl_div(own, theirs, reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True)
class Objective:
    smoothing: float = 0.0  # eps
    weights: Tensor | None = None  # (C,)
    teacher: Teacher | None = None

    def count(self, labels: Tensor) -> Tensor:
        """N of these labels (...)."""
        return self._weights(labels[labels != IGNORED]).sum()

    def loss(self, logits: Tensor, labels: Tensor, items: Tensor | int, taught: Tensor | None = None) -> Tensor:
        """L of logits (..., C) for labels (...), `items` being N; `taught` are the teacher's logits."""
        learned = labels != IGNORED
        logits, labels = logits[learned].float(), labels[learned]
        weights = None if self.weights is None else self.weights.to(logits.device)
        total = F.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=self.smoothing)
        if self.teacher is not None and taught is not None:
            a = self.teacher.settings.weight
            apart = self._weights(labels) * self.teacher.divergence(logits, taught[learned])
            total = (1 - a) * total + a * apart.sum()
        return total / items

    def _weights(self, labels: Tensor) -> Tensor:
        """w of each label (n,)."""
        return torch.ones_like(labels) if self.weights is None else self.weights.to(labels.device)[labels]


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
