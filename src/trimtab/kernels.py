"""Fast forms of formulas that stand plainly elsewhere: the same values and gradients in fewer passes and less memory.

Each is chosen in one place, by `fits` or `base_weight`. Without this file all would be right, and slower.

The low-rank product s B A drop(x) of LoRA (methods/lora.py) keeps x for the backward pass: the tensor itself, which
others mostly keep as well, not one that is cast or dropped. The mask of its dropout is drawn again from a seed.

    N = batch x length, i and o: the layer's inputs and outputs, r: the rank
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import weights
from .sites import lineage

FEW = 2**15  # elements of an input, below which calling a function from Python costs more than it saves
LANES = 2**16  # dropout draws 16 bits for an element, a quarter of the time of PyTorch's floats on a CPU


def fits(site: nn.Module, x: Tensor) -> bool:
    """Whether the low-rank product at this site is to be the function below: it knows how, and it is worth it."""
    return x.numel() >= FEW and known(site, x)


def known(site: nn.Module, x: Tensor) -> bool:
    """Whether the functions below can do this: linear layers in one dtype.

    Compilers, functorch and autocast rewrite formulas, and find none there: they get the plain one.
    """
    return (
        type(x) is Tensor
        and x.is_floating_point()
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch._C._are_functorch_transforms_active()
        and not isinstance(site, (nn.Embedding, *weights.CONVOLUTIONS))
    )


def base_weight(site: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
    """The W (o, i) where y is known to be W x + b, nobody else's, and W and b are frozen: what `adapted` asks for.

    Only the two forwards that are known are trusted. One of a quantized or user's own layer may keep y.
    """
    original = lineage(type(site))[1]
    if original.forward is not nn.Linear.forward and original.__module__ != "transformers.pytorch_utils":
        return None
    W, b = cast(Tensor, site.weight), cast(Tensor | None, site.bias)
    plain = type(W) in (nn.Parameter, Tensor) and not W.requires_grad and (b is None or not b.requires_grad)
    if not plain or not x.dtype == y.dtype == W.dtype or type(y) is not Tensor or not y.is_contiguous():
        return None
    return W if original.forward is nn.Linear.forward else W.T


def product(x: Tensor, A: Tensor, B: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """s B A drop(x) of x (..., i), A (r, i), B (o, r), in x's dtype: (..., o). Gradients have each one's own.

    p is rounded to a multiple of 1 / 65536, and what is kept is divided by 1 - p as rounded: its mean is x's.
    """
    return _apply(x, A, B, None, None, scale, p)


def adapted(y: Tensor, x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """y = W x + b -> y + s B A drop(x), in place, where W is what `base_weight` gave.

    The gradient of x through W is taken here too: so the two parts of it are added as the second is computed, and y is
    no node of the graph, of which PyTorch would copy the gradient (it mostly is a view).
    """
    return _apply(x, A, B, W, y.detach(), scale, p)


def _apply(x: Tensor, A: Tensor, B: Tensor, W: Tensor | None, y: Tensor | None, scale: float, p: float) -> Tensor:
    result: Tensor = _LowRank.apply(x, A, B, W, y, scale, p, seed(p))  # type: ignore[no-untyped-call]
    return result


def seed(p: float) -> int:
    """Of a mask; from PyTorch's own generator, so that `manual_seed` and gradient checkpointing reproduce the mask."""
    return int(torch.randint(2**63 - 1, ())) if p else 0


def _kept(p: float) -> int:
    """How many of the lanes keep an element."""
    return max(1, round((1 - p) * LANES))


def enlarged(p: float) -> float:
    """By how much dropout enlarges what it keeps: 1 / (1 - p)."""
    return LANES / _kept(p) if p else 1.0


def mask(x: Tensor, p: float, seed: int) -> Tensor:
    """1 where an element of x is kept, else 0; in x's dtype, not divided by 1 - p."""
    if not p:
        return torch.ones_like(x)
    generator = torch.Generator(x.device).manual_seed(seed)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    lanes = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()].view(x.shape)
    return torch.lt(lanes, _kept(p) - LANES // 2, out=torch.empty_like(lanes, dtype=x.dtype))


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, W: Tensor | None, y: Tensor | None, scale: float, p: float, seed: int
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, i)
        ctx.scale, ctx.p, ctx.seed = scale * enlarged(p), p, seed
        h = ((mask(rows, p, seed).mul_(rows) if p else rows) @ A.to(x.dtype).T).mul_(ctx.scale)  # (N, r)
        grown = B.to(x.dtype).T  # (r, o)
        if y is None:
            y = h.view(*x.shape[:-1], len(A)) @ grown
        else:
            ctx.mark_dirty(y)
            y.view(-1, len(B)).addmm_(h, grown)
        needs_x, needs_A, needs_B = ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if needs_A else None, h if needs_B else None, A, B, W if needs_x else None)
        return y

    @staticmethod  # PyTorch casts what this gives to the dtype of each input
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, A, B, W = ctx.saved_tensors
        needs_x, needs_A, needs_B = ctx.needs_input_grad[:3]
        g = grad.reshape(-1, grad.shape[-1])  # (N, o)
        grad_x = grad_A = grad_B = None
        if needs_B:
            grad_B = (h.T @ g).T  # (g.T @ h is the same, in three times the time)
        if needs_x or needs_A:
            grad_h = (g @ B.to(g.dtype)).mul_(ctx.scale)  # (N, r)
            kept = mask(g.new_empty(len(g), A.shape[1]), ctx.p, ctx.seed) if ctx.p else None
        if needs_A:
            rows = x.reshape(-1, x.shape[-1])
            grad_A = grad_h.T @ (rows if kept is None else rows * kept)
        if needs_x:
            grad_x = _grad_x(g, grad_h, A.to(g.dtype), W, kept).view(*grad.shape[:-1], A.shape[1])
        return grad_x, grad_A, grad_B, None, None, None, None, None


def _grad_x(g: Tensor, grad_h: Tensor, A: Tensor, W: Tensor | None, mask: Tensor | None) -> Tensor:
    """(N, i): what came through W, where that is ours to give, and through A."""
    if W is None:
        return grad_h @ A if mask is None else mask.mul_(grad_h @ A)
    own = g @ W
    return own.addmm_(grad_h, A) if mask is None else own.add_(mask.mul_(grad_h @ A))


class Stacks:
    """The pairs of several adapters for one batch, of which each has some blocks of rows: n blocks in all.

    Pairs are A (r, i), B (o, r) and s, r up to `rank`, to which they are filled up with zeros.
    """

    def __init__(
        self, pairs: list[tuple[Tensor, Tensor, float]], rank: int, blocks: int, slots: Tensor | None, x: Tensor
    ) -> None:
        """slots: (n,) the pair of each block; None where that is the order of the pairs. x: as those to come."""
        self.pairs, self.rank, self.blocks = pairs, rank, blocks
        self.slots = None if slots is None else slots.to(x.device)
        self.scales = self.of_blocks(
            torch.tensor([s for *_, s in pairs], dtype=x.dtype, device=x.device).view(-1, 1, 1)
        )
        with torch.no_grad():
            self.A, self.B = self._stacked(x.dtype)

    def _stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(n, rank, i) and (n, rank, o), as products of few rows read them fastest."""
        As, Bs = [A for A, _, _ in self.pairs], [B.T for _, B, _ in self.pairs]
        if any(len(A) != self.rank for A in As):
            As, Bs = ([F.pad(part, (0, 0, 0, self.rank - len(part))) for part in parts] for parts in (As, Bs))
        return self.of_blocks(torch.stack(As).to(dtype)), self.of_blocks(torch.stack(Bs).to(dtype))

    def of_blocks(self, stack: Tensor) -> Tensor:
        return stack if self.slots is None else stack[self.slots]

    def of_pairs(self, grads: Tensor) -> Tensor:
        """The sums over the blocks of each pair."""
        if self.slots is None:
            return grads
        return grads.new_zeros(len(self.pairs), *grads.shape[1:]).index_add_(0, self.slots, grads)

    def product(self, x: Tensor, mask: Callable[[], Tensor] | None) -> Tensor:
        """s B A drop(x), as `product` above, each block with its own s, B and A. mask: draws what x is times."""
        return self._apply(x, None, None, mask)

    def plain(self, x: Tensor, mask: Callable[[], Tensor] | None) -> Tensor:
        """As `product`, in PyTorch's own functions."""
        A, B = self._stacked(x.dtype)
        blocks = (x if mask is None else mask() * x).reshape(self.blocks, -1, x.shape[-1])
        return torch.bmm(torch.bmm(blocks, A.mT) * self.scales, B).view(*x.shape[:-1], -1)

    def adapted(self, y: Tensor, x: Tensor, W: Tensor, mask: Callable[[], Tensor] | None) -> Tensor:
        """y = W x + b -> y + s B A drop(x), as `adapted` above."""
        return self._apply(x, W, y.detach(), mask)

    def _apply(self, x: Tensor, W: Tensor | None, y: Tensor | None, mask: Callable[[], Tensor] | None) -> Tensor:
        parts = [part for A, B, _ in self.pairs for part in (A, B)]
        result: Tensor = _LowRanks.apply(x, W, y, self, mask, *parts)  # type: ignore[no-untyped-call]
        return result


class _LowRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor | None,
        y: Tensor | None,
        stacks: Stacks,
        mask: Callable[[], Tensor] | None,
        *parts: Tensor,  # noqa: ARG004 - for their gradients
    ) -> Tensor:
        blocks = (x if mask is None else mask().mul_(x)).reshape(stacks.blocks, -1, x.shape[-1])
        h = torch.bmm(blocks, stacks.A.mT).mul_(stacks.scales)  # (n, N / n, r)
        if y is None:
            y = torch.bmm(h, stacks.B).view(*x.shape[:-1], -1)
        else:
            ctx.mark_dirty(y)
            y.view(stacks.blocks, -1, y.shape[-1]).baddbmm_(h, stacks.B)
        ctx.stacks, ctx.mask = stacks, mask
        ctx.save_for_backward(x, h, W)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, W = ctx.saved_tensors
        stacks, mask = ctx.stacks, None if ctx.mask is None else ctx.mask()
        g = grad.reshape(stacks.blocks, -1, grad.shape[-1])  # (n, N / n, o)
        grad_h = torch.bmm(g, stacks.B.mT).mul_(stacks.scales)
        grads: list[Tensor | None] = [None] * (2 * len(stacks.pairs))
        if any(ctx.needs_input_grad[5:]):
            blocks = (x if mask is None else mask * x).reshape(stacks.blocks, -1, x.shape[-1])
            grad_A = stacks.of_pairs(torch.bmm(grad_h.mT, blocks)).unbind()
            grad_B = stacks.of_pairs(torch.bmm(h.mT, g)).unbind()
            for i, (A, _, _) in enumerate(stacks.pairs):
                grads[2 * i], grads[2 * i + 1] = grad_A[i][: len(A)], grad_B[i][: len(A)].T
        grad_x = None
        if ctx.needs_input_grad[0]:
            through = None if mask is None else mask.view(*g.shape[:2], -1)
            if W is None:
                grad_x = torch.bmm(grad_h, stacks.A)
                grad_x = grad_x if through is None else through.mul_(grad_x)
            else:
                grad_x = g @ W
                if through is None:
                    grad_x.baddbmm_(grad_h, stacks.A)
                else:
                    grad_x.add_(through.mul_(torch.bmm(grad_h, stacks.A)))
            grad_x = grad_x.view(x.shape)
        return grad_x, None, None, None, None, *grads
