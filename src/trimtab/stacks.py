"""LoRA's products of several adapters, each on rows of its own of one batch: as kernels.py has them for one adapter.

n: blocks of equally many rows, each of one adapter; N = batch x length, i and o: the layer's inputs and outputs
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import rebuilt

Made = tuple[Tensor, Tensor, Tensor | None]  # A and B^T of blocks, and s, None where that is in B^T
VERSION = attrgetter("_version")  # of a tensor: goes up when it is written to


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
        self._used: int | None = None  # the version that was used last
        self._made: tuple[int, Made] | None = None

    def stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (n, rank, i) and B (n, o, rank) of the blocks. Gradients go to the pairs, to each those of its blocks."""
        As, Bs = [A for A, _ in self.pairs], [B for _, B in self.pairs]
        if not self.even:
            missing = [self.rank - r for r in self.ranks]
            As = [F.pad(A, (0, 0, 0, more)) for A, more in zip(As, missing, strict=True)]
            Bs = [F.pad(B, (0, more)) for B, more in zip(Bs, missing, strict=True)]
        return self._of_blocks(torch.stack(As).to(dtype)), self._of_blocks(torch.stack(Bs).to(dtype))

    def kept(self, dtype: torch.dtype) -> Made:
        """A (n, rank, i), B^T (n, rank, o) and s: kept from the second use on, until somebody changes a pair.

        Then B^T lies as products of few rows read it fastest, and s is in it: there is none beside it. What is used
        once is not kept: memory that is free again at once serves the next layer while it is in the cache.
        """
        version = sum(map(VERSION, self._watched))  # none ever goes down
        if self._made is None or self._made[0] != version:
            A, B = self.stacked(dtype)
            made: Made = A, B.mT, self.scales
            if self._used == version:
                made = A, (B.mT.contiguous() * self.scales).to(dtype), None
                self._made = version, made
            self._used = version
            return made
        return self._made[1]

    def forget(self) -> None:
        """What is kept."""
        self._used = self._made = None

    def _of_blocks(self, stack: Tensor) -> Tensor:
        return stack if self.slots is None else stack.index_select(0, self.slots)

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
    """s B A drop(x) with each row's own s, B and A, as kernels.product; 0 for rows that are in no stack."""
    return _apply_stacks(x, None, x.new_zeros(*x.shape[:-1], outputs), stacks, mask)


def all_adapted(y: Tensor, x: Tensor, W: Tensor, stacks: Sequence[Stacks], mask: Mask | None) -> Tensor:
    """y = W x + b -> y + s B A drop(x) with each row's own s, B and A, as kernels.adapted."""
    return _apply_stacks(x, W, y.detach(), stacks, mask)


def plain_products(x: Tensor, stacks: Sequence[Stacks], outputs: int, mask: Mask | None) -> Tensor:
    """As `products`, in PyTorch's own functions."""
    x = x if mask is None else mask() * x
    low = x.new_zeros(*x.shape[:-1], outputs)
    for own in stacks:
        A, B = own.stacked(x.dtype)
        found = torch.bmm((torch.bmm(own.of(x), A.mT) * own.scales).to(x.dtype), B.mT)
        if own.rows is None:
            low = low + found.view(low.shape)
        else:
            low = low.index_add(0, own.rows, found.view(len(own.rows), *low.shape[1:]).to(low.dtype))
    return low


def _apply_stacks(x: Tensor, W: Tensor | None, y: Tensor, stacks: Sequence[Stacks], mask: Mask | None) -> Tensor:
    if not torch.is_grad_enabled():
        _add_all(y, x, stacks, [own.kept(x.dtype) for own in stacks], mask)
        return y
    parts = [part for own in stacks for part in own.stacked(x.dtype)]
    result: Tensor = _LowRanks.apply(x, W, y, stacks, mask, *parts)  # type: ignore[no-untyped-call]
    return result


def _add_all(y: Tensor, x: Tensor, stacks: Sequence[Stacks], made: Sequence[Made], mask: Mask | None) -> list[Tensor]:
    """y += s B A drop(x); A drop(x) of each stack, (n, N / n, r), times s where that is given by itself."""
    dropped, hs = x if mask is None else mask().mul_(x), []
    for own, (A, B, scales) in zip(stacks, made, strict=True):
        h = torch.bmm(own.of(dropped), A.mT)
        hs.append(h if scales is None else h.mul_(scales))
        own.add(y, hs[-1], B)
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
        *parts: Tensor,
    ) -> Tensor:
        """parts: A (n, rank, i) and B (n, o, rank) of each stack in turn."""
        made = [(A, B.mT, own.scales) for own, A, B in zip(stacks, parts[::2], parts[1::2], strict=True)]
        hs = _add_all(y, x, stacks, made, mask)
        ctx.mark_dirty(y)
        ctx.stacks, ctx.mask = stacks, mask
        ctx.size = x.shape
        kept, ctx.input = rebuilt.parts(x) if any(ctx.needs_input_grad[5:]) else ([], None)
        ctx.kept = len(kept)
        ctx.save_for_backward(W, *kept, *hs, *parts)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W, *others = ctx.saved_tensors
        kept, others, n = others[: ctx.kept], others[ctx.kept :], len(ctx.stacks)
        hs, As, Bs = others[:n], others[n::2], others[n + 1 :: 2]
        mask = None if ctx.mask is None else ctx.mask()
        gs = [own.of(grad) for own in ctx.stacks]  # (n, N / n, o) each
        grad_hs = [torch.bmm(g, B).mul_(own.scales) for g, B, own in zip(gs, Bs, ctx.stacks, strict=True)]
        grads: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 5)
        if any(ctx.needs_input_grad[5:]):
            grads = []
            x = ctx.input(kept)
            dropped = x if mask is None else mask * x
            for own, g, h, grad_h in zip(ctx.stacks, gs, hs, grad_hs, strict=True):
                grads += [torch.bmm(grad_h.mT, own.of(dropped)), torch.bmm(g.mT, h)]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.new_zeros(ctx.size)
            for own, A, grad_h in zip(ctx.stacks, As, grad_hs, strict=True):
                own.add(grad_x, grad_h, A)
            grad_x = grad_x if mask is None else grad_x.mul_(mask)
            if W is not None:
                grad_x.view(-1, ctx.size[-1]).addmm_(grad.reshape(-1, grad.shape[-1]), W)
        return grad_x, None, None, None, None, *grads
