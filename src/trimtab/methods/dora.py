"""DoRA (Liu et al. 2024, arXiv 2402.09353), LoRA with use_dora=True: y = g (W x + s B A x) + b, g = m / ||W + s B A||.

The norm is that of each output's row over all its inputs; m (out,) starts at the rows' own norms, so that nothing
changes at first. As in the paper (section 4.3) the gradient takes the norm as a constant. The norm is computed from

    ||W + s B A||^2 = ||W||^2 + 2 s <W A', B> + s^2 <B A A', B>        (row by row)

so that no second matrix as large as W is made. With dropout the paper's code drops inputs of the W x that it
rescales, too, which costs a second product with W; here dropout acts on the low-rank part alone, as in LoRA.
"""

import torch
from torch import Tensor, nn

from .. import weights
from .bitfit import own_bias


class Magnitude(nn.Module):
    """m, beside a pair A (r, in, *kernel), B (out, r, *ones) of scale s."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        shape = weights.layout(site)
        assert shape is not None
        # The shape in HF PEFT's files: (out,), and (1, out, 1, ...) on convolutions.
        around = [1] if shape.kernel else []
        self.value = weights.new_parameter(site, *around, shape.out, *[1] * len(shape.kernel))

    @torch.no_grad()
    def start(self, site: nn.Module, A: Tensor, B: Tensor, scale: float) -> None:
        self.value.copy_(_norms(site, A, B, scale).view_as(self.value))

    def factor(self, site: nn.Module, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """g (out,)."""
        norms = _norms(site, A, B, scale)
        return self.value.flatten() / norms.clamp_min(torch.finfo(norms.dtype).tiny)  # a row of zeros stays one

    def rescale(self, site: nn.Module, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """y = W x + s B A x + b -> g (y - b) + b, written so that g = 1 changes no bit of y."""
        g = self.factor(site, A, B, scale).to(y.dtype)
        bias = own_bias(site)
        if isinstance(site, weights.CONVOLUTIONS):
            g = g.view(-1, *[1] * len(site.kernel_size))
            bias = None if bias is None else bias.view_as(g)
        return torch.addcmul(y, g - 1, y if bias is None else y - bias)

    def fold(self, site: nn.Module, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """W + s B A -> g (W + s B A)."""
        g = self.factor(site, A, B, scale).to(weight.dtype)
        return weight * g.view(-1, *[1] * (weight.dim() - 1))

    def fold_bias(self, site: nn.Module, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor | None:
        """The site's own bias is not rescaled; what another adapter added to it before is."""
        own = own_bias(site)
        if bias is None or own is None or bias is own:
            return bias
        return bias + (self.factor(site, A, B, scale) - 1).to(bias.dtype) * (bias - own)


@torch.no_grad()
def _norms(site: nn.Module, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """||W + s B A|| (out,), of the base's weight."""
    W = weights.read(site).flatten(1)  # (out, in)
    A, B = A.flatten(1), B.flatten(1)
    own = torch.linalg.vector_norm(W, dim=1, dtype=B.dtype) ** 2
    cross = ((W @ A.to(W.dtype).T).to(B.dtype) * B).sum(1)
    low = ((B @ (A @ A.T)) * B).sum(1)
    squared: Tensor = own + 2 * scale * cross + scale**2 * low
    return squared.clamp_min(0).sqrt()
