"""Fast forms of formulas that stand plainly elsewhere: the same values and gradients in fewer passes and less memory.

Each is chosen in one place, by `fits` or `base_weight`. Without this file all would be right, and slower.

The low-rank product s B A drop(x) of LoRA (methods/lora.py) keeps x for the backward pass: the tensor itself, which
others mostly keep as well, not one that is cast or dropped. The mask of its dropout is drawn again from a seed.

    N = batch x length, i and o: the layer's inputs and outputs, r: the rank
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import rebuilt, weights
from .sites import lineage

FEW = 2**15  # elements of an input, below which calling a function from Python costs more than it saves
CARDS = ("cuda",)  # kinds of devices with kernels of their own (triton_kernels.py)
VERSION = attrgetter("_version")  # of a tensor: goes up when it is written to
PIECE = 2**16  # elements of a mask that are drawn and used at a time on a CPU
LANES = 2**16  # dropout draws 16 bits for an element, a quarter of the time of PyTorch's floats on a CPU


def fits(site: nn.Module, x: Tensor) -> bool:
    """Whether the low-rank product at this site is to be the function below: it knows how, and it is worth it."""
    return x.numel() >= FEW and known(site, x)


def known(site: nn.Module, x: Tensor) -> bool:
    """Whether the functions below can do this: linear layers.

    Compilers and functorch rewrite formulas, and find none there: they get the plain one. So do CUDA graphs, which
    would repeat the seed of a mask, and with it the mask.
    """
    return (
        type(x) is Tensor
        and x.is_floating_point()
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
        and not isinstance(site, (nn.Embedding, *weights.CONVOLUTIONS))
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """In which products of x are computed: autocast's, where that is on."""
    device = x.device.type
    cast_to = not x.is_meta and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast_to else x.dtype


def base_weight(site: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
    """The W (o, i) where y is known to be W x + b, nobody else's, and W and b are frozen: what `adapted` asks for.

    Only the two forwards that are known are trusted. One of a quantized or user's own layer may keep y.
    """
    original = _original(cast(Any, type(site)))
    if original.forward is not nn.Linear.forward and original.__module__ != "transformers.pytorch_utils":
        return None
    W, b = cast(Tensor, site.weight), cast(Tensor | None, site.bias)
    plain = type(W) in (nn.Parameter, Tensor) and not W.requires_grad and (b is None or not b.requires_grad)
    if not plain or not x.dtype == y.dtype == W.dtype or type(y) is not Tensor or not y.is_contiguous():
        return None
    return W if original.forward is nn.Linear.forward else W.T


@functools.cache
def _original(cls: Any) -> Any:
    """The class of a layer before it was a site."""
    return lineage(cls)[1]


def product(x: Tensor, A: Tensor, B: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """s B A drop(x) of x (..., i), A (r, i), B (o, r), in `compute_dtype`: (..., o). Gradients have each one's own.

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
    whole = torch.empty_like(x, memory_format=torch.contiguous_format)
    flat = whole.view(-1, x.shape[-1])
    for own, kept in _masks(flat.shape[0], flat.shape[1], x, p, seed):
        flat[own] = kept
    return whole


def _masks(N: int, i: int, like: Tensor, p: float, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """The mask (N, i) piece by piece: which rows, and theirs, until the next one. On a CPU it stays in the cache."""
    size = max(1, PIECE // i // 4) * 4 if like.device.type == "cpu" else N  # a word has four lanes
    draw, room = _drawing(like.device, seed), like.new_empty(size, i)
    for start in range(0, N, size):
        rows = min(size, N - start)
        lanes = draw(-(-rows * i // 4)).view(torch.int16)[: rows * i].view(rows, i)
        yield slice(start, start + rows), torch.lt(lanes, _kept(p) - LANES // 2, out=room[:rows])


def _drawing(device: torch.device, seed: int) -> Callable[[int], Tensor]:
    """What draws as many int64 as it is asked for."""
    if device.type == "cpu":  # in half the time that PyTorch's generator takes
        bits = np.random.SFC64(seed)
        return lambda number: torch.from_numpy(bits.random_raw(number).view(np.int64))
    generator = torch.Generator(device).manual_seed(seed)
    return lambda number: torch.empty(number, dtype=torch.int64, device=device).random_(
        -(2**63), None, generator=generator
    )


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, W: Tensor | None, y: Tensor | None, scale: float, p: float, seed: int
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))  # (N, i)
        ctx.scale, ctx.p, ctx.seed, ctx.fused = scale * enlarged(p), p, seed, _fused(rows, A, p)
        if ctx.fused:
            h = ctx.fused.into(rows, A.to(rows.dtype), _kept(p), seed)
        else:
            h = _into(rows, A.to(rows.dtype), p, seed)
        h.mul_(ctx.scale)  # (N, r)
        grown = B.to(rows.dtype).T  # (r, o)
        if y is None:
            y = h.view(*x.shape[:-1], len(A)) @ grown
        else:
            ctx.mark_dirty(y)
            y.view(-1, len(B)).addmm_(h, grown)
        needs_x, needs_A, needs_B = ctx.needs_input_grad[:3]
        kept, ctx.input = rebuilt.parts(x) if needs_A else ([], None)
        ctx.save_for_backward(h if needs_B else None, A, B, W if needs_x else None, *kept)
        return y

    @staticmethod  # PyTorch casts what this gives to the dtype of each input
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, A, B, W, *kept = ctx.saved_tensors
        needs_x, needs_A, needs_B = ctx.needs_input_grad[:3]
        g = grad.reshape(-1, grad.shape[-1])  # (N, o)
        grad_x = grad_A = grad_B = None
        if needs_B:
            grad_B = (h.T @ g).T  # (g.T @ h is the same, in three times the time)
        if needs_x or needs_A:
            grad_h = (g @ B.to(g.dtype)).mul_(ctx.scale)  # (N, r)
            rows = ctx.input(kept).reshape(-1, A.shape[1]).to(g.dtype) if needs_A else None
            if ctx.fused:
                grad_A = None if rows is None else ctx.fused.grad_a(grad_h, rows, _kept(ctx.p), ctx.seed)
                own = g @ W if W is not None else None
                grad_x = ctx.fused.grad_x(grad_h, A.to(g.dtype), own, _kept(ctx.p), ctx.seed) if needs_x else None
            else:
                grad_A, grad_x = _out_of(grad_h, rows, A.to(g.dtype) if needs_x else None, ctx.p, ctx.seed)
                if grad_x is not None and W is not None:
                    grad_x.addmm_(g, W)  # a product adds for nothing
            grad_x = grad_x if grad_x is None else grad_x.view(*grad.shape[:-1], A.shape[1])
        return grad_x, grad_A, grad_B, None, None, None, None, None


def _into(x: Tensor, A: Tensor, p: float, seed: int) -> Tensor:
    """A times what dropout leaves of x (N, i), not enlarged: (N, r)."""
    if not p:
        return x @ A.T
    h = x.new_empty(len(x), len(A))
    for own, kept in _masks(x.shape[0], x.shape[1], x, p, seed):
        torch.mm(kept.mul_(x[own]), A.T, out=h[own])
    return h


def _out_of(
    grad_h: Tensor, x: Tensor | None, A: Tensor | None, p: float, seed: int
) -> tuple[Tensor | None, Tensor | None]:
    """Of the h (N, r) of `_into` the gradients of A, where x is given, and of x, where A is."""
    if not p:
        return None if x is None else grad_h.T @ x, None if A is None else grad_h @ A
    i = x.shape[1] if x is not None else A.shape[1]  # type: ignore[union-attr]
    grad_A = None if x is None else grad_h.new_zeros(grad_h.shape[1], i)
    grad_x = None if A is None else grad_h.new_empty(len(grad_h), i)
    for own, kept in _masks(len(grad_h), i, grad_h, p, seed):
        if A is not None and grad_x is not None:
            torch.mm(grad_h[own], A, out=grad_x[own]).mul_(kept)
        if x is not None and grad_A is not None:
            grad_A.addmm_(grad_h[own].T, kept.mul_(x[own]))
    return grad_A, grad_x


def _fused(x: Tensor, A: Tensor, p: float) -> Any:
    """The kernels for graphics cards (triton_kernels.py), where there is dropout and they can do it."""
    if not p or x.device.type not in CARDS or not _compiles(x.device, x.dtype):
        return None
    from . import triton_kernels

    return triton_kernels if triton_kernels.fits(x, A) else None


@functools.cache
def _compiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton is there, and the compiler it needs, and the card knows what it makes of this dtype: by trying."""
    try:
        from . import triton_kernels

        ones = torch.ones(1, 1, device=device, dtype=dtype)
        return not triton_kernels.fits(ones, ones) or triton_kernels.into(ones, ones, LANES, 0).item() == 1
    except Exception:  # of whatever kind: the plain form does the same
        return False


def drawn(x: Tensor, A: Tensor, p: float, seed: int) -> Tensor:
    """The mask, as `mask` gives it, that `product` of x and A draws from this seed."""
    if fused := _fused(x, A, p):
        return cast(Tensor, fused.mask(x.view(-1, x.shape[-1]), _kept(p), seed)).view(x.shape)
    return mask(x, p, seed)


class Stacks:
    """Pairs of several adapters for one batch, each of which has some blocks of its rows: n blocks in all.

    Pairs are A (r, i) and B (o, r), r up to `rank`, to which they are filled up with zeros, and s one number for each.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        scales: Sequence[float],
        rank: int,
        blocks: int,
        slots: Tensor | None,
        rows: Tensor | None,
        x: Tensor,
        fixed: bool = False,
    ) -> None:
        """slots: (n,) the pair of each block; None where that is the order of the pairs. rows: those of the batch that
        the blocks are, None for all. x: a batch such as there will be. fixed: whether pairs are never written to."""
        self.pairs, self.rank, self.blocks = pairs, rank, blocks
        self.ranks = [A.shape[0] for A, _ in pairs]
        self.even = set(self.ranks) == {rank}
        self.slots, self.rows = (None if own is None else own.to(x.device) for own in (slots, rows))
        # At least float32: in bfloat16 a scale would be off by up to 0.4 %.
        exact = torch.promote_types(x.dtype, torch.float32)
        self.scales = self._of_blocks(torch.tensor(scales, dtype=exact, device=x.device).view(-1, 1, 1))
        self._watched = [] if fixed else [part for pair in pairs for part in pair if not part.is_inference()]
        self._made: tuple[int, tuple[Tensor, Tensor]] | None = None

    def stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (n, rank, i) and B^T (n, rank, o) of the blocks."""
        As, Bs = [A for A, _ in self.pairs], [B for _, B in self.pairs]
        if not self.even:
            missing = [self.rank - r for r in self.ranks]
            As = [F.pad(A, (0, 0, 0, more)) for A, more in zip(As, missing, strict=True)]
            Bs = [F.pad(B, (0, more)) for B, more in zip(Bs, missing, strict=True)]
        return self._of_blocks(torch.stack(As).to(dtype)), self._of_blocks(torch.stack(Bs).to(dtype)).mT

    def kept(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A^T (n, i, rank) and s B^T (n, rank, o), made once, until somebody changes a pair."""
        version = sum(map(VERSION, self._watched))  # none ever goes down
        if self._made is None or self._made[0] != version:
            A, B = self.stacked(dtype)
            self._made = version, (A.mT, (B * self.scales).to(dtype))
        elif not self._made[1][1].is_contiguous():  # as products of few rows read it fastest: it is used again
            A, B = self._made[1]
            self._made = version, (A, B.contiguous())
        return self._made[1]

    def forget(self) -> None:
        """What is kept. After gradients comes a step, and of a fused optimizer's the versions do not tell."""
        self._made = None

    def _of_blocks(self, stack: Tensor) -> Tensor:
        return stack if self.slots is None else stack[self.slots]

    def of_pairs(self, grads: Tensor) -> Sequence[Tensor]:
        """For each pair the sum over its blocks."""
        if self.slots is not None:
            grads = grads.new_zeros(len(self.pairs), *grads.shape[1:]).index_add_(0, self.slots, grads)
        return cast(Sequence[Tensor], grads.unbind())

    def grads(self, grad_A: Tensor, grad_B: Tensor) -> list[Tensor]:
        """Of grad_A (n, rank, i) and grad_B (n, rank, o) those of each A and B in turn, without what fills them up."""
        As, Bs = self.of_pairs(grad_A), self.of_pairs(grad_B.mT.contiguous())
        if not self.even:
            As = [own[:r] for own, r in zip(As, self.ranks, strict=True)]
            Bs = [own[:, :r] for own, r in zip(Bs, self.ranks, strict=True)]
        return [part for pair in zip(As, Bs, strict=True) for part in pair]

    def of(self, batch: Tensor) -> Tensor:
        """The blocks in a batch (rows, ..., m): (n, N / n, m)."""
        own = batch if self.rows is None else batch[self.rows]
        return own.reshape(self.blocks, -1, batch.shape[-1])

    def add(self, batch: Tensor, h: Tensor, stack: Tensor) -> None:
        """batch += h stack, of blocks h (n, N / n, rank) and a stack (n, rank, m), in place."""
        if self.rows is None:
            batch.view(self.blocks, -1, batch.shape[-1]).baddbmm_(h, stack)
        else:
            batch.index_add_(0, self.rows, torch.bmm(h, stack).view(len(self.rows), *batch.shape[1:]))


Mask = Callable[[], Tensor]  # draws, the same each time, what dropout has x times: as x


def products(x: Tensor, stacks: Sequence[Stacks], outputs: int, mask: Mask | None) -> Tensor:
    """s B A drop(x) with each row's own s, B and A, as `product` above; 0 for rows that are in no stack."""
    return _apply_stacks(x, None, x.new_zeros(*x.shape[:-1], outputs), stacks, mask)


def all_adapted(y: Tensor, x: Tensor, W: Tensor, stacks: Sequence[Stacks], mask: Mask | None) -> Tensor:
    """y = W x + b -> y + s B A drop(x) with each row's own s, B and A, as `adapted` above."""
    return _apply_stacks(x, W, y.detach(), stacks, mask)


def plain_products(x: Tensor, stacks: Sequence[Stacks], outputs: int, mask: Mask | None) -> Tensor:
    """As `products`, in PyTorch's own functions."""
    x = x if mask is None else mask() * x
    low = x.new_zeros(*x.shape[:-1], outputs)
    for own in stacks:
        A, B = own.stacked(x.dtype)
        found = torch.bmm((torch.bmm(own.of(x), A.mT) * own.scales).to(x.dtype), B)
        if own.rows is None:
            low = low + found.view(low.shape)
        else:
            low = low.index_add(0, own.rows, found.view(len(own.rows), *low.shape[1:]).to(low.dtype))
    return low


def _apply_stacks(x: Tensor, W: Tensor | None, y: Tensor, stacks: Sequence[Stacks], mask: Mask | None) -> Tensor:
    if not torch.is_grad_enabled():  # a function of so many arguments takes longer to call than to compute
        dropped = x if mask is None else mask().mul_(x)
        for own in stacks:
            A, B = own.kept(x.dtype)
            own.add(y, torch.bmm(own.of(dropped), A), B)
        return y
    for own in stacks:
        own.forget()
    parts = [part for own in stacks for pair in own.pairs for part in pair]
    result: Tensor = _LowRanks.apply(x, W, y, stacks, mask, *parts)  # type: ignore[no-untyped-call]
    return result


def _add_all(
    y: Tensor, x: Tensor, stacks: Sequence[Stacks], made: Sequence[tuple[Tensor, Tensor]], mask: Mask | None
) -> list[Tensor]:
    """y += s B A drop(x); s A drop(x) of each stack, (n, N / n, r)."""
    dropped = x if mask is None else mask().mul_(x)
    hs = [torch.bmm(own.of(dropped), A.mT).mul_(own.scales) for own, (A, _) in zip(stacks, made, strict=True)]
    for own, (_, B), h in zip(stacks, made, hs, strict=True):
        own.add(y, h, B)
    return hs


class _LowRanks(torch.autograd.Function):
    """One for all stacks of a batch, so that gradients of x are added up in one order, whoever else is in it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor | None,
        y: Tensor,
        stacks: Sequence[Stacks],
        mask: Mask | None,
        *parts: Tensor,  # noqa: ARG004 - for their gradients
    ) -> Tensor:
        made = [own.stacked(x.dtype) for own in stacks]
        hs = _add_all(y, x, stacks, made, mask)
        ctx.mark_dirty(y)
        ctx.stacks, ctx.mask = stacks, mask
        ctx.size = x.shape
        kept, ctx.input = rebuilt.parts(x) if any(ctx.needs_input_grad[5:]) else ([], None)
        ctx.kept = len(kept)
        ctx.save_for_backward(W, *kept, *hs, *(A for A, _ in made), *(B for _, B in made))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W, *others = ctx.saved_tensors
        kept, others, n = others[: ctx.kept], others[ctx.kept :], len(ctx.stacks)
        hs, As, Bs = others[:n], others[n : 2 * n], others[2 * n :]
        mask = None if ctx.mask is None else ctx.mask()
        gs = [own.of(grad) for own in ctx.stacks]  # (n, N / n, o) each
        grad_hs = [torch.bmm(g, B.mT).mul_(own.scales) for g, B, own in zip(gs, Bs, ctx.stacks, strict=True)]
        grads: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 5)
        if any(ctx.needs_input_grad[5:]):
            grads = []
            x = ctx.input(kept)
            dropped = x if mask is None else mask * x
            for own, g, h, grad_h in zip(ctx.stacks, gs, hs, grad_hs, strict=True):
                grads += own.grads(torch.bmm(grad_h.mT, own.of(dropped)), torch.bmm(h.mT, g))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.new_zeros(ctx.size)
            for own, A, grad_h in zip(ctx.stacks, As, grad_hs, strict=True):
                own.add(grad_x, grad_h, A)
            grad_x = grad_x if mask is None else grad_x.mul_(mask)
            if W is not None:
                grad_x.view(-1, ctx.size[-1]).addmm_(grad.reshape(-1, grad.shape[-1]), W)
        return grad_x, None, None, None, None, *grads
