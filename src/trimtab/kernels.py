"""Fast forms of formulas that stand plainly elsewhere: the same values and gradients in fewer passes and less memory.

Each is chosen in one place, by `fits` or `base_weight`. Without this file all would be right, and slower.

The low-rank product s B A drop(x) of LoRA (methods/lora.py) keeps no x for the backward pass that is cast or dropped,
but that which others keep as well, or what it is made of (rebuilt.py). The mask of its dropout is drawn again from a
seed. Several adapters' products in one batch are in stacks.py.

    N = batch x length, i and o: the layer's inputs and outputs, r: the rank
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from . import rebuilt, weights
from .swap import lineage

FEW = 2**17  # elements of an input, below which calling a function from Python costs more than it saves
CARDS = ("cuda",)  # kinds of devices with kernels of their own (triton_kernels.py)
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
    exact = torch.promote_types(grad_h.dtype, torch.float32)  # in bfloat16 a sum over many pieces loses its end
    grad_A = None if x is None else grad_h.new_zeros(grad_h.shape[1], i, dtype=exact)
    grad_x = None if A is None else grad_h.new_empty(len(grad_h), i)
    for own, kept in _masks(len(grad_h), i, grad_h, p, seed):
        if A is not None and grad_x is not None:
            torch.mm(grad_h[own], A, out=grad_x[own]).mul_(kept)
        if x is not None and grad_A is not None:
            grad_A += grad_h[own].T @ kept.mul_(x[own])
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
