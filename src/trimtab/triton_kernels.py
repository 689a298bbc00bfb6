"""What kernels.py does with dropout, for graphics cards: the mask is drawn where it is used, and lies nowhere.

In plain PyTorch a mask is written and read several times over, at two bytes of random bits and more for an element.
Here every kernel that needs it draws it again from the seed and the place of the element (Philox; Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"). The kernels are compiled at their first use.

    N: rows, i: inputs, r: rank. Sums are float32. kept: how many of 65,536 random values keep an element.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HIGHEST = 128  # rank whose sums fit into registers
ROWS, COLUMNS = 64, 64  # of a block
SPLIT = 1024  # rows that one block adds up for the gradient of A: more blocks than columns alone would give


def fits(x: Tensor, A: Tensor) -> bool:
    known = x.is_cuda or x.dtype != torch.bfloat16  # of those Triton's interpreter multiplies the bits
    return known and x.dtype in DTYPES and len(A) <= HIGHEST


@triton.jit
def _mask(rows, columns, N, i, seed, kept):
    """Which elements of a block are inside x, and kept."""
    lanes = tl.randint(seed, rows[:, None] * i + columns[None, :]) & 0xFFFF
    return (rows[:, None] < N) & (columns[None, :] < i) & (lanes < kept)


@triton.jit(do_not_specialize=["seed"])
def _into(x, A, h, N, i, r, seed, kept, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK)
    found = tl.zeros((ROWS, RANK), tl.float32)
    for first in range(0, i, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        values = tl.load(x + rows[:, None] * i + columns[None, :], _mask(rows, columns, N, i, seed, kept), 0.0)
        inside = (columns[:, None] < i) & (ranks[None, :] < r)
        factors = tl.load(A + ranks[None, :] * i + columns[:, None], inside, 0.0)
        found = tl.dot(values, factors, found, input_precision="ieee")
    tl.store(h + rows[:, None] * r + ranks[None, :], found, (rows[:, None] < N) & (ranks[None, :] < r))


@triton.jit(do_not_specialize=["seed"])
def _grad_a(
    grad_h, x, parts, N, i, r, seed, kept,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1).to(tl.int64)
    ranks = tl.arange(0, RANK)
    found = tl.zeros((RANK, COLUMNS), tl.float32)
    for first in range(0, SPLIT, ROWS):
        rows = part * SPLIT + first + tl.arange(0, ROWS)
        values = tl.load(x + rows[:, None] * i + columns[None, :], _mask(rows, columns, N, i, seed, kept), 0.0)
        inside = (rows[None, :] < N) & (ranks[:, None] < r)
        grads = tl.load(grad_h + rows[None, :] * r + ranks[:, None], inside, 0.0)
        found = tl.dot(grads, values, found, input_precision="ieee")
    inside = (ranks[:, None] < r) & (columns[None, :] < i)
    tl.store(parts + (part * r + ranks[:, None]) * i + columns[None, :], found, inside)


@triton.jit(do_not_specialize=["seed"])
def _grad_x(grad_h, A, own, N, i, r, seed, kept, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK)
    grads = tl.load(grad_h + rows[:, None] * r + ranks[None, :], (rows[:, None] < N) & (ranks[None, :] < r), 0.0)
    factors = tl.load(A + ranks[:, None] * i + columns[None, :], (ranks[:, None] < r) & (columns[None, :] < i), 0.0)
    low = tl.dot(grads, factors, input_precision="ieee")
    keeps = _mask(rows, columns, N, i, seed, kept)
    place = own + rows[:, None] * i + columns[None, :]
    tl.store(place, tl.load(place, keeps, 0.0) + low, keeps)


def into(x: Tensor, A: Tensor, kept: int, seed: int) -> Tensor:
    """A drop(x) of x (N, i) and A (r, i): (N, r)."""
    x, A = x.contiguous(), A.contiguous()
    h = x.new_empty(len(x), len(A))
    with torch.cuda.device_of(x):
        _into[(_blocks(len(x), ROWS),)](x, A, h, *x.shape, len(A), seed, kept, ROWS, COLUMNS, _rank(len(A)))
    return h


def grad_a(grad_h: Tensor, x: Tensor, kept: int, seed: int) -> Tensor:
    """The sum over rows of grad_h drop(x)^T: (r, i)."""
    grad_h, x = grad_h.contiguous(), x.contiguous()
    r, grid = grad_h.shape[1], (_blocks(x.shape[1], COLUMNS), _blocks(len(x), SPLIT))
    parts = torch.empty(grid[1], r, x.shape[1], device=x.device)
    with torch.cuda.device_of(x):
        _grad_a[grid](grad_h, x, parts, *x.shape, r, seed, kept, ROWS, COLUMNS, _rank(r), SPLIT)
    return parts.sum(0)


def grad_x(grad_h: Tensor, A: Tensor, own: Tensor | None, kept: int, seed: int) -> Tensor:
    """own (N, i), zero for None, plus grad_h A where x was kept, in place."""
    grad_h, A = grad_h.contiguous(), A.contiguous()
    N, r, i = *grad_h.shape, A.shape[1]
    own = grad_h.new_zeros(N, i) if own is None else own
    with torch.cuda.device_of(own):
        grid = _blocks(N, ROWS), _blocks(i, COLUMNS)
        _grad_x[grid](grad_h, A, own, N, i, r, seed, kept, ROWS, COLUMNS, _rank(r))
    return own


def mask(x: Tensor, kept: int, seed: int) -> Tensor:
    """1 where an element of x (N, i) is kept, else 0."""
    return grad_x(x.new_ones(len(x), 1), x.new_ones(1, x.shape[1]), None, kept, seed)


def _blocks(size: int, block: int) -> Any:
    return triton.cdiv(size, block)


def _rank(r: int) -> int:
    """Filled up to what a product of blocks takes."""
    return max(16, triton.next_power_of_2(r))
