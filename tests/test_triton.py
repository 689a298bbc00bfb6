"""The kernels for graphics cards are the formula with the mask that they draw: on a card, or in Triton's interpreter.

conftest.py asks for the interpreter, before anybody imports Triton.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from battery import close
from torch import Tensor

from trimtab import kernels

pytest.importorskip("triton", reason="Triton is made for Linux only")
P, SEED = 0.3, 2**62 + 12345
SHAPES = [(5, 7, 3), (130, 200, 8), (1100, 70, 20)]  # N, i, r: less than a block, several, more than one sum


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from trimtab import triton_kernels

    monkeypatch.setattr(kernels, "CARDS", (DEVICE,))
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield triton_kernels


def mask(made: Any, N: int, i: int, p: float = P, seed: int = SEED) -> Tensor:
    """What the kernels keep: a gradient of ones, where it comes through."""
    found: Tensor = made.mask(torch.empty(N, i), kernels._kept(p), seed)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_kernel_is_its_formula(shape: tuple[int, int, int], dtype: torch.dtype, made: Any) -> None:
    """Sums are float32: only what comes out is rounded."""
    N, i, r = shape
    x, A, grad_h, own = (torch.randn(size, dtype=dtype) for size in ((N, i), (r, i), (N, r), (N, i)))
    kept, keeps = kernels._kept(P), mask(made, N, i)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    pairs = [
        (made.into(x, A, kept, SEED), (x.float() * keeps) @ A.float().T),
        (made.grad_a(grad_h, x, kept, SEED), grad_h.float().T @ (x.float() * keeps)),
        (made.grad_x(grad_h, A, own.clone(), kept, SEED), own + (grad_h.float() @ A.float()) * keeps),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * expected.std().item())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9999])
def test_as_much_is_kept_as_is_said(p: float, made: Any) -> None:
    """Within 6 standard errors, and otherwise with another seed."""
    keeps = mask(made, 300, 200, p)
    assert set(keeps.unique().tolist()) <= {0.0, 1.0}
    assert abs(keeps.mean().item() - (1 - p)) <= 6 * (p * (1 - p) / keeps.numel()) ** 0.5
    if p < 0.9:
        assert not torch.equal(keeps, mask(made, 300, 200, p, SEED + 1))


@pytest.mark.parametrize("form", ["product", "adapted"])
def test_values_and_gradients_are_those_of_the_formula(form: str, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of y = W x + s B A drop(x), with one mask in both directions."""
    monkeypatch.setattr(kernels, "seed", lambda _: SEED)
    W = torch.randn(9, 50)
    x, A, B = (torch.randn(size, requires_grad=True) for size in ((3, 4, 50), (6, 50), (9, 6)))
    weights = torch.randn(3, 4, 9)
    if form == "adapted":
        found = kernels.adapted(x @ W.T, x, W, A, B, 0.7, P)
    else:
        found = x @ W.T + kernels.product(x, A, B, 0.7, P)
    drop = mask(made, 12, 50).view(3, 4, 50) * kernels.enlarged(P)
    expected = x @ W.T + 0.7 * (x * drop) @ A.T @ B.T
    close(found, expected)
    inputs = x, A, B
    for own, plain in zip(
        torch.autograd.grad(found, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True
    ):
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-5 * plain.std().item())


def test_when_they_are_used(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, A = torch.randn(4, 5), torch.randn(3, 5)
    assert kernels._fused(x, A, P) is made
    assert kernels._fused(x, A, 0.0) is None, "there is nothing to draw"
    assert kernels._fused(x.double(), A.double(), P) is None
    assert kernels._fused(x, torch.randn(129, 5), P) is None, "too many sums"
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "CARDS", ("xpu",))
    assert kernels._fused(x, A, P) is None


def test_where_triton_cannot_compile_the_plain_form_has_to_do(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be no compiler, or a card that does not know the dtype."""

    def fails(*_: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler")

    kernels._compiles.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(made, "into", fails)
        x, A = torch.randn(4, 5), torch.randn(3, 5)
        assert kernels._fused(x, A, P) is None
        kernels.product(x, A, torch.randn(2, 3), 1.0, P)
    kernels._compiles.cache_clear()
    assert kernels._fused(x, A, P) is made


def test_the_mask_of_a_group_is_that_of_the_product(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows of one batch drop what they drop alone."""
    monkeypatch.setattr(kernels, "seed", lambda _: SEED)
    x, eye = torch.randn(3, 4, 5), torch.eye(5)
    close(kernels.product(x, eye, eye, 1.0, P), x * kernels.drawn(x, eye, P, SEED) * kernels.enlarged(P))
