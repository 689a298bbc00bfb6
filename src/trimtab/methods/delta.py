"""y = f(x) + D x: what methods have in common that build a whole D, as large as the weight, from fewer numbers."""

from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import weights
from ..adapter import Adapter
from ..targets import TargetConfig, check_patterns, pattern_value
from .biased import BiasedAdapter


class DeltaAdapter(BiasedAdapter):
    """rank_dropout: probability with which a row of D is left out of a training step; module_dropout: all of D.

    rescale: enlarge the rows that stay, so that the mean stays.
    """

    def __init__(self, rank_dropout: float = 0.0, module_dropout: float = 0.0, rescale: bool = False) -> None:
        super().__init__()
        self.rank_dropout, self.module_dropout, self.rescale = rank_dropout, module_dropout, rescale
        self.dropout = max(rank_dropout, module_dropout)

    @abstractmethod
    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """D in the shape of the site's weight, (out, in / groups, *kernel)."""

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        D = self.delta(shape_of(site))
        if self.training and self.rank_dropout:
            kept = torch.rand(len(D), device=D.device) >= self.rank_dropout
            factor = 1 / (1 - self.rank_dropout) if self.rescale else 1.0
            D = D * (kept * factor).view(-1, *[1] * (D.dim() - 1))
        if self.training and self.module_dropout:
            D = D * (torch.rand((), device=D.device) >= self.module_dropout)
        return self.with_bias(site, y + weights.linear(site, x, D.to(y.dtype)).to(y.dtype))

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        return weight + self.delta(shape_of(site)).to(weight.dtype)


class DeltaConfig(TargetConfig):
    """Settings that LoHa and LoKr share.

    r: rank. alpha: D is scaled by alpha / r. rank_dropout, module_dropout: probabilities, in training, of leaving out
    a row of D or all of it. rank_pattern, alpha_pattern: other values for the modules a key (a regular expression
    for the end of the name) means. use_effective_conv2d: on convolutions with a kernel, a core tensor between two
    factors of the channels (FedPara, arXiv 2108.06098, proposition 3) instead of one flat matrix.
    """

    r: int = Field(default=8, ge=1)
    alpha: int | float = 8
    rank_dropout: float = Field(default=0.0, ge=0, lt=1)
    module_dropout: float = Field(default=0.0, ge=0, lt=1)
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int | float] = {}

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        targets = [name for name, adapter in made.items() if isinstance(adapter, DeltaAdapter)]
        check_patterns("rank_pattern", self.rank_pattern, targets)
        check_patterns("alpha_pattern", self.alpha_pattern, targets)
        return made

    def rank(self, name: str) -> int:
        return pattern_value(self.rank_pattern, name, self.r)

    def scale(self, name: str) -> float:
        return pattern_value(self.alpha_pattern, name, self.alpha) / self.rank(name)


def shape_of(site: nn.Module) -> tuple[int, ...]:
    """(out, in / groups, *kernel)."""
    shape = weights.layout(site)
    assert shape is not None
    return shape.out, shape.into // shape.groups, *shape.kernel


def core_shape(r: int, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Of the core tensor between two factors of the channels; HF PEFT gives a Conv1d's a second kernel side."""
    return r, r, *kernel, *([1] if len(kernel) == 1 else [])


def with_core(T: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """T (r, r, *kernel), a (r, out), b (r, in) -> (out, in, kernel's size)."""
    return torch.einsum("ijk,ip,jq->pqk", T.flatten(2), a, b)
