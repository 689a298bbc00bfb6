"""y = W x + b + B (A x): what methods have in common that make a pair B (out, r), A (r, in) from other numbers."""

from abc import abstractmethod

from torch import Tensor, nn
from torch.nn import functional as F

from ..targets import is_linear
from .biased import BiasedAdapter, BiasedConfig


class PairAdapter(BiasedAdapter):
    @abstractmethod
    def pair(self) -> tuple[Tensor, Tensor]:
        """B and A."""

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        B, A = (matrix.to(x) for matrix in self.pair())
        h = F.linear(F.dropout(x, self.dropout, self.training), A)
        return self.with_bias(site, y + F.linear(h, B).to(y.dtype))

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        B, A = self.pair()
        return weight + (B @ A).to(weight)

    def low_rank(self, site: nn.Module) -> tuple[Tensor, Tensor] | None:
        return self.pair()


class PairConfig(BiasedConfig):
    def fits(self, module: nn.Module) -> bool:
        return is_linear(module)


class Shared(nn.Module):
    """Trained numbers of which several adapters make their pairs: one object that all of them hold."""

    def __init__(self, values: nn.Parameter) -> None:
        super().__init__()
        self.values = values
