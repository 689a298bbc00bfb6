"""Inputs that are made again of what the graph keeps: the same bits, nothing kept on top, nothing wrong in silence."""

from collections.abc import Callable, Sequence
from typing import Any

import models
import pytest
import torch
from battery import close, loss
from models import Tiny, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab import LoraConfig, get_peft_model, kernels, rebuilt


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def norm(h: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """As Llama has it, with a frozen weight."""
    return torch.randn(h.shape[-1], dtype=dtype) * (h * h.pow(2).mean(-1, keepdim=True).rsqrt()).to(dtype)


def itself(parts: Sequence[Tensor]) -> Tensor:
    return parts[0]


MADE: dict[str, Callable[[], tuple[Tensor, int]]] = {  # an input, and of how many parts it is made
    "act(gate) times up": lambda: (nn.functional.silu(leaf(3, 4)) * leaf(3, 4), 2),
    "norm": lambda: (norm(leaf(2, 3, 4)), 3),
    "norm in bfloat16": lambda: (norm(leaf(2, 3, 4), torch.bfloat16), 3),
    "both trained": lambda: (leaf(4) * leaf(3, 4), 2),
    "gelu": lambda: (nn.functional.gelu(leaf(3, 4)), 1),
    "gelu of tanh": lambda: (nn.functional.gelu(leaf(3, 4), approximate="tanh"), 1),
    "scaled": lambda: (0.5 * (leaf(3, 4) * leaf(3, 4)), 3),
}
KEPT: dict[str, Callable[[], Tensor]] = {
    "given": lambda: torch.randn(3, 4),
    "leaf": lambda: leaf(3, 4),
    "sum": lambda: leaf(3, 4) + leaf(3, 4),
    "one factor kept": lambda: (leaf(3, 4) + 1) * torch.randn(4),
    "cast": lambda: leaf(3, 4).bfloat16(),
    "product of a cast sum": lambda: (leaf(3, 4) + 1).bfloat16() * torch.randn(4).bfloat16(),
}


@pytest.mark.parametrize("form", MADE.values(), ids=MADE)
def test_the_same_bits(form: Callable[[], tuple[Tensor, int]]) -> None:
    x, number = form()
    parts, make = rebuilt.parts(x)
    assert len(parts) == number
    assert all(part.data_ptr() != x.data_ptr() for part in parts)
    with torch.no_grad():
        again = make(parts)
    assert again.dtype == x.dtype
    assert torch.equal(again, x)


@pytest.mark.parametrize("form", KEPT.values(), ids=KEPT)
def test_what_the_graph_does_not_keep_is_kept(form: Callable[[], Tensor]) -> None:
    x = form()
    assert rebuilt.parts(x)[0] == [x]


@pytest.mark.parametrize(
    ("dtype", "affine"),
    [*((dtype, ("weight", "bias")) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
     (torch.bfloat16, ("weight",)), (torch.float32, ())], ids=str,
)  # fmt: skip
def test_a_layer_norm_is_the_same_but_for_rounding(dtype: torch.dtype, affine: tuple[str, ...]) -> None:
    layer = nn.LayerNorm(8, elementwise_affine=bool(affine), bias="bias" in affine)
    for value in layer.parameters():  # float32, as mean and deviation of bfloat16 are then
        nn.init.normal_(value)
    layer = layer.to(torch.promote_types(dtype, torch.float32))
    x = layer(leaf(3, 8).to(dtype) * 100)
    parts, make = rebuilt.parts(x)
    assert len(parts) == 3 + len(affine)
    again = make(parts)
    assert again.dtype == x.dtype
    torch.testing.assert_close(again, x, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_a_layer_norm_that_keeps_rounded_numbers_is_kept() -> None:
    x = nn.LayerNorm(8).bfloat16()(leaf(3, 8).bfloat16())
    assert rebuilt.parts(x)[0] == [x]


@pytest.mark.parametrize("graph", [True, False])
def test_what_was_written_to_is_kept(graph: bool) -> None:
    x = leaf(3, 4) * leaf(3, 4)
    with torch.set_grad_enabled(graph):
        x[0] = 0
    assert rebuilt.parts(x)[0] == [x]


def test_hooks_that_acted_on_the_parts_are_left_alone() -> None:
    """A checkpointed layer that ends in a product: looking at its parts would compute it once more."""
    runs = 0

    def layer(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return nn.functional.gelu(x) * x

    x = checkpoint(layer, leaf(3, 4), use_reentrant=False)
    assert rebuilt.parts(x)[0] == [x]
    assert runs == 1


def test_a_part_that_is_not_there_for_good_is_not_taken() -> None:
    """As a frozen norm's weight in a unit that FSDP has gathered and given back."""
    weight = torch.randn(4)
    x = weight * (leaf(3, 4) * leaf(3, 4))
    assert len(rebuilt.parts(x)[0]) == 3
    weight.untyped_storage().resize_(0)
    assert rebuilt.parts(x)[0] == [x]


def test_a_graph_that_is_freed_is_not_asked() -> None:
    x = leaf(3, 4) * leaf(3, 4)
    x.sum().backward()
    A = leaf(2, 4)
    (found,) = torch.autograd.grad(kernels.product(x, A, torch.ones(3, 2), 1.0).sum(), A)
    close(found, 3 * x.detach().sum(0).expand(2, 4))


def test_a_move_to_another_device_is_made_too() -> None:
    x = (leaf(3, 4) * leaf(3, 4)).to("meta")
    found, make = rebuilt.parts(x)
    assert len(found) == 2
    assert make(found).is_meta


def test_hooks_are_left_alone() -> None:
    """A checkpoint's would compute the layer again to show what it did not keep."""
    x = leaf(3, 4) * leaf(3, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
        assert rebuilt.parts(x)[0] == [x]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


def adapted(p: float = 0.0) -> Any:
    settings = LoraConfig(r=2, target_modules=["gate", "up", "down"], init_lora_weights=False, lora_dropout=p)
    return get_peft_model(Mlp(), settings).train()


def grads(model: nn.Module, act: Callable[[], None]) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    act()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradients_are_those_of_a_kept_input(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit; where layers are checkpointed too, and in a second pass over the graph."""
    model, x = adapted(p), leaf(5, 6)
    found = grads(model, lambda: model(norm(x)).sum().backward())
    twice = grads(model, lambda: _twice(model(norm(x)).sum()))
    again = grads(model, lambda: checkpoint(model, norm(x), use_reentrant=False).sum().backward())
    monkeypatch.setattr(rebuilt, "parts", lambda x: ([x], itself))
    kept = grads(model, lambda: model(norm(x)).sum().backward())
    assert len(kept) == 6
    for one, other, double, checkpointed in zip(kept, found, twice, again, strict=True):
        assert torch.equal(other, one)
        assert torch.equal(checkpointed, one)
        close(double, 2 * one)


def _twice(value: Tensor) -> None:
    value.backward(retain_graph=True)
    value.backward()


@pytest.mark.parametrize("build", [models.llama, models.t5, models.bert], ids=lambda build: build.__name__)
def test_models(build: Callable[[], Tiny], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build()
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.3))
    randomise(model)
    model.train()
    found = grads(model, lambda: loss(model, inputs).backward())
    seen, parts = list[int](), rebuilt.parts

    def keeping(x: Tensor) -> tuple[list[Tensor], Any]:
        seen.append(len(parts(x)[0]))
        return [x], itself

    monkeypatch.setattr(rebuilt, "parts", keeping)
    kept = grads(model, lambda: loss(model, inputs).backward())
    assert len(found) == len(kept) > 0
    for a, b in zip(found, kept, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert max(seen) > 1


def test_a_factor_that_was_written_to_is_an_error() -> None:
    gate, up = leaf(5, 4), leaf(5, 4)
    one, other = gate + 0, up + 0
    y = kernels.product(one * other, leaf(2, 4), leaf(3, 2), 1.0)
    with torch.no_grad():
        other.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_is_kept_but_what_is_as_narrow_as_the_rank() -> None:
    """Beside what the frozen model keeps: h (N, r) of each layer, in bytes of float32."""
    frozen, model, x = Mlp().requires_grad_(False), adapted(0.5), leaf(512, 6)
    assert held(lambda: model(norm(x))) - held(lambda: frozen(norm(x))) <= 3 * 512 * 2 * 4


def held(forward: Callable[[], Tensor]) -> int:
    """Bytes that are there after a forward pass and were not before."""
    with torch.autograd.profiler.profile(profile_memory=True) as seen:
        value = forward()
    events = [event for event in seen.kineto_results.events() if event.name() == "[memory]"]
    del value
    return sum(event.nbytes() for event in events)
