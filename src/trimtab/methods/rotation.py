"""y = s (W (x M)) + b: what methods have in common that turn a layer's input by an orthogonal M, and may scale rows.

On a convolution M turns the patches that its kernel sees; patches overlap, so that there the weight is turned
instead of the input, which is the same map. On an embedding M turns the rows of the table.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from .. import weights
from ..errors import ConfigError, closest_divisor
from .biased import BiasedAdapter
from .bitfit import own_bias
from .delta import shape_of


class RotationAdapter(BiasedAdapter):
    """scale holds s, one number per output, in any shape; None where a method has none."""

    scale: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.scale = None

    @abstractmethod
    def rotate(self, v: Tensor, drop: bool) -> Tensor:
        """v M for v (..., n), in the type of v; `drop` leaves parts of M out, as the method's dropout says."""

    def before(self, site: nn.Module, x: Tensor) -> Tensor:
        return self.rotate(x, self.training) if _turns_input(site) else x

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if isinstance(site, nn.Embedding):
            y = self.rotate(y, self.training)
        elif not _turns_input(site):
            y = y + weights.linear(site, x, self._change(site, self.training).to(x.dtype)).to(y.dtype)
        elif self.scale is not None:
            s, b = self.scale.flatten().to(y.dtype), own_bias(site)
            y = y + (s - 1) * (y if b is None else y - b)
        return self.with_bias(site, y)

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        if isinstance(site, nn.Embedding):  # (out, in): its rows are the table's columns
            return self.rotate(weight.T, False).T
        if not _turns_input(site):
            return weight + self._change(site, False).to(weight.dtype)
        return self._turned(weight, False)

    def merged_bias(self, site: nn.Module, bias: Tensor | None) -> Tensor | None:
        own = own_bias(site)
        if self.scale is not None and _turns_input(site) and bias is not None and own is not None and bias is not own:
            bias = bias + (self.scale.flatten().to(bias.dtype) - 1) * (bias - own)  # s leaves the site's own as it is
        return super().merged_bias(site, bias)

    def _turned(self, weight: Tensor, drop: bool) -> Tensor:
        """s W M^T for W (out, n)."""
        M = self.rotate(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), drop)
        turned = weight @ M.T
        return turned if self.scale is None else turned * self.scale.view(-1, 1).to(weight.dtype)

    def _change(self, site: nn.Module, drop: bool) -> Tensor:
        """s W M^T - W of a convolution, in the shape of its weight."""
        W = weights.read(site)
        W = W.to(weights.master_dtype(W.dtype))
        return (self._turned(W.flatten(1), drop) - W.flatten(1)).view_as(W)


def _turns_input(site: nn.Module) -> bool:
    return not isinstance(site, (nn.Embedding, *weights.CONVOLUTIONS))


def turned_features(site: nn.Module) -> int:
    """n: the inputs of one output, or the numbers in a row of an embedding's table."""
    out, into, *kernel = shape_of(site)
    return out if isinstance(site, nn.Embedding) else into * math.prod(kernel)


def split(name: str, features: int, setting: str, wanted: int) -> int:
    """features / wanted, or a ConfigError that names the closest number that divides."""
    if wanted < 1 or features % wanted:
        raise ConfigError(f"{name} turns {features} features: {setting}={wanted} does not divide them. "
                          f"Closest: {closest_divisor(wanted, features)}.")  # fmt: skip
    return features // wanted


def skew(upper: Tensor, size: int) -> Tensor:
    """Q (blocks, size, size) with these numbers (blocks, size (size - 1) / 2) above its diagonal, and Q = -Q^T."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    blocks = torch.arange(len(upper), device=upper.device)[:, None]
    Q = upper.new_zeros(len(upper), size, size).index_put((blocks, rows, columns), upper)
    return Q - Q.mT


def series(Q: Tensor, terms: int) -> Tensor:
    """The sum of `terms` terms of (I + Q) (I - Q)^-1 = I + 2 Q + 2 Q^2 + ..., as HF PEFT counts them."""
    total = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    if terms < 3:
        return total + 2 * Q if terms == 2 else total
    power, last = Q, max(terms - 1, 3)
    for exponent in range(1, last + 1):
        total = total + (1 if exponent == last else 2) * power
        power = power @ Q
    return total


def cayley(Q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1 of skew-symmetric Q (..., b, b): orthogonal."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    solved: Tensor = torch.linalg.solve(eye + Q, eye - Q, left=False)
    return solved


def drop_blocks(R: Tensor, p: float) -> Tensor:
    """Blocks (..., b, b), each with probability p replaced by the identity."""
    kept = torch.rand(R.shape[:-2], device=R.device) >= p
    return torch.where(kept[..., None, None], R, torch.eye(R.shape[-1], dtype=R.dtype, device=R.device))
