"""The fast forms against the plain formulas they stand for, values and gradients, and where they must not be used."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import models
import pytest
import torch
from battery import close, loss, run
from models import Tiny, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab import LoraConfig, get_peft_model, kernels, stacks


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "fits", lambda *_: False)


def seeded(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the same dropout at every call, as finite differences need it."""

    def call(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        return form(*inputs)

    return call


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (3, 3, 5)], ids=str)
@pytest.mark.parametrize("form", ["product", "adapted", "adapted, transposed"])
def test_gradients_by_finite_differences(
    form: str, shape: tuple[int, ...], p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, on a layer that is not square, whose weight may be stored transposed; masks in up to three pieces."""
    monkeypatch.setattr(kernels, "PIECE", 1)
    W = torch.randn(5, 7, dtype=torch.float64).T if "transposed" in form else torch.randn(7, 5, dtype=torch.float64)

    def adapted(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return kernels.adapted(nn.functional.linear(x, W), x, W, A, B, 0.7, p)

    def product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return kernels.product(x, A, B, 0.7, p)

    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (shape, (3, 5), (7, 3))]
    assert torch.autograd.gradcheck(seeded(product if form == "product" else adapted), inputs)


@pytest.mark.parametrize("shape", [(9, 5), (8, 3), (2, 7, 6)], ids=str)
def test_a_mask_is_the_same_in_pieces(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(shape)
    whole = kernels.mask(x, 0.4, 11)
    monkeypatch.setattr(kernels, "PIECE", 1)
    assert torch.equal(kernels.mask(x, 0.4, 11), whole)
    A, B = torch.eye(shape[-1]), torch.eye(shape[-1])
    kept, seed = 1 / kernels.enlarged(0.4), kernels.seed
    monkeypatch.setattr(kernels, "seed", lambda p: 11 if p else seed(p))
    close(kernels.product(x, A, B, kept, 0.4), x * whole)


def test_a_gradient_over_many_pieces_is_as_precise_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, whose sums would lose what comes late: 256 pieces of 4 rows."""
    monkeypatch.setattr(kernels, "PIECE", 1)
    x, g = torch.randn(1024, 16).bfloat16(), torch.randn(1024, 3).bfloat16()
    A, B = torch.randn(2, 16).bfloat16().requires_grad_(), torch.randn(3, 2).bfloat16()
    monkeypatch.setattr(kernels, "seed", lambda p: 5 if p else 0)
    kernels.product(x, A, B, 1.0, 0.25).backward(g)
    h = (g @ B).mul(kernels.enlarged(0.25))
    expected = h.double().T @ (x * kernels.mask(x, 0.25, 5)).double()
    assert A.grad is not None
    assert (A.grad - expected).norm() < 4e-3 * expected.norm()


LAYERS: dict[str, Callable[[], Tiny]] = {
    "linear": models.mlp, "llama": models.llama, "bert": models.bert, "gpt2": models.gpt2, "t5": models.t5,
    "vit": models.vit,
}  # fmt: skip


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    loss(model, inputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{}, {"bias": "all"}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_models_are_those_of_the_plain_formula(
    build: Callable[[], Tiny], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where the order of sums does not show."""
    model, inputs = build()
    model.double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", **settings))
    randomise(model)
    fast = run(model, inputs), gradients(model, inputs)
    plain(monkeypatch)
    slow = run(model, inputs), gradients(model, inputs)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
    assert slow[1]


def one(layer: nn.Module, **settings: Any) -> Any:
    settings = {"r": 2, "target_modules": ["0"], "init_lora_weights": False, **settings}
    return get_peft_model(nn.Sequential(layer), LoraConfig(**settings)).train()


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_only_the_input_itself_is_kept(p: float) -> None:
    """No copy of it, cast or dropped; beside it h, of width r, and the weights, which are there anyway."""
    model, x = one(nn.Linear(5, 7).bfloat16(), lora_dropout=p), torch.randn(64, 5, dtype=torch.bfloat16)
    x.requires_grad_()
    weights = {value.data_ptr() for value in model.parameters()}
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
        y = model(x)
    assert y.dtype == torch.bfloat16
    new = [tensor for place, tensor in kept.items() if place not in weights]
    assert sorted(tuple(tensor.shape) for tensor in new) == [(64, 2), (64, 5)]
    assert x.data_ptr() in kept


def test_master_weights_get_float32_gradients_on_a_half_precision_base() -> None:
    model = one(nn.Linear(5, 7).bfloat16())
    model(torch.randn(4, 5, dtype=torch.bfloat16)).sum().backward()
    adapter = model[0].adapters["default"]
    assert adapter.A.grad.dtype == adapter.B.grad.dtype == torch.float32


def test_a_frozen_a_keeps_no_input() -> None:
    """LoRA-FA's point."""
    model, x = one(nn.Linear(5, 7)), torch.randn(64, 5)
    model[0].adapters["default"].A.requires_grad_(False)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        model(x)
    assert (64, 5) not in kept


def test_a_second_derivative_is_refused() -> None:
    """The gradient is no formula that could be differentiated, and must not be taken for a constant."""
    model, x = one(nn.Linear(5, 7)), torch.randn(4, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class Keeping(nn.Linear):
    """A user's layer that keeps its output."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept


def test_an_output_that_somebody_keeps_stays() -> None:
    model, x = one(Keeping(5, 7)), torch.randn(4, 5)
    y = model(x)
    layer = model[0]
    close(layer.kept, nn.functional.linear(x, layer.weight, layer.bias))
    assert not torch.equal(y, layer.kept)


def test_a_weight_that_is_trained_too_gets_its_gradient() -> None:
    model, x = one(nn.Linear(5, 7)), torch.randn(4, 5)
    model[0].weight.requires_grad_(True)
    model(x).sum().backward()
    close(model[0].weight.grad, x.sum(0).expand(7, 5))


def test_a_trained_bias_gets_its_gradient() -> None:
    model, x = one(nn.Linear(5, 7)), torch.randn(4, 5)
    model[0].bias.requires_grad_(True)
    model(x).sum().backward()
    close(model[0].bias.grad, torch.full((7,), 4.0))


def test_several_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one's y is no plain product of x."""
    model, x = one(nn.Linear(5, 7)), {"input": torch.randn(4, 5)}
    model.add_adapter("more", LoraConfig(r=1, target_modules=["0"], init_lora_weights=False))
    model.set_adapter(["default", "more"])
    fast = run(model, x), gradients(model, x)
    plain(monkeypatch)
    close(fast[0], run(model, x))
    for name, value in gradients(model, x).items():
        close(fast[1][name], value)


def test_a_trained_copy_at_the_same_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then y is not made with the base's weight, and the gradient of x must not be taken through that."""
    model, _ = models.mlp()
    get_peft_model(model, LoraConfig(r=2, target_modules=["first"]))
    model.add_adapter("copy", LoraConfig(r=2, target_modules=["second"], modules_to_save=["first"]))
    model.set_adapter(["default", "copy"])
    randomise(model)
    x = torch.randn(4, 5, requires_grad=True)
    (fast,) = torch.autograd.grad(loss(model, {"x": x}), x)
    plain(monkeypatch)
    close(fast, torch.autograd.grad(loss(model, {"x": x}), x)[0])


@pytest.mark.parametrize("bias", [True, False])
def test_others_may_change_the_result_in_place(bias: bool) -> None:
    """As nn.ReLU(inplace=True) does; the result of an autograd function that is a view would refuse."""
    model, x = one(nn.Linear(5, 7, bias=bias)), torch.randn(2, 4, 5, requires_grad=True)
    expected = torch.autograd.grad(model(x).relu().pow(2).sum(), x)
    close(torch.autograd.grad(model(x).relu_().pow(2).sum(), x)[0], expected[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], AbstractContextManager[None]]) -> None:
    model, x = one(nn.Linear(5, 7)), torch.randn(4, 5)
    expected = model(x).detach()
    with mode():
        close(model(x), expected)
        close(model(torch.ones_like(x) * x), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_dropout_again(reentrant: bool) -> None:
    model, x = one(nn.Linear(5, 7), lora_dropout=0.5), torch.randn(64, 5, requires_grad=True)
    expected = gradients_of(model, x, model)
    again = gradients_of(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    for first, second in zip(expected, again, strict=True):
        assert torch.equal(first, second)


def gradients_of(model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    model.zero_grad()
    x.grad = None
    torch.manual_seed(4)
    call(x).pow(2).sum().backward()
    return [value.grad.clone() for value in (x, *model.parameters()) if value.grad is not None]


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_is_that_of_the_plain_formula(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """x is no leaf: of those autocast keeps what they are cast to, and adds up gradients in its precision."""
    model, leaf = one(nn.Linear(5, 7)), torch.randn(4, 5, requires_grad=True)
    x, adapter = leaf * 1, model[0].adapters["default"]
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with context:
        fast = model(x)
    assert "_LowRank" in str([fast.grad_fn, *(before for before, _ in fast.grad_fn.next_functions)])
    grads = torch.autograd.grad(fast.sum(), (x, adapter.A, adapter.B))
    plain(monkeypatch)
    with context:
        slow = model(x)
    assert fast.dtype == slow.dtype == (torch.bfloat16 if autocast else torch.float32)
    close(fast, slow)
    for one_of, other in zip(grads, torch.autograd.grad(slow.sum(), (x, adapter.A, adapter.B)), strict=True):
        assert one_of.dtype == torch.float32
        close(one_of, other)


def test_under_autocast_the_input_is_kept_and_no_copy_of_it() -> None:
    model, x = one(nn.Linear(5, 7), lora_dropout=0.5), torch.randn(64, 5, requires_grad=True)
    kept: dict[int, Tensor] = {}
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(x)
    assert [value.data_ptr() for value in kept.values() if value.shape == x.shape] == [x.data_ptr()]


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.75, 0.9999, 1 - 1e-9])
def test_the_mean_of_dropout_is_exact(p: float) -> None:
    """What is kept, over how many of the 65,536 values of a lane are kept: a mean of 1 over all values."""
    kept = kernels._kept(p)
    assert 1 <= kept <= kernels.LANES
    assert abs(kept / kernels.LANES - (1 - p)) <= 1 / kernels.LANES
    eye = torch.eye(4)
    values = kernels.product(torch.ones(2**16, 4), eye, eye, 1.0, p).unique()
    close(values[values > 0], torch.full((int((values > 0).sum()),), kernels.LANES / kept))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 4097])
def test_masks_of_any_size(size: int) -> None:
    mask = kernels.mask(torch.empty(size, 1), 0.25, 1)
    assert mask.shape == (size, 1)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    if size > 4000:  # 6 standard errors are 0.04
        assert abs(mask.mean().item() - 0.75) < 0.04


def test_few_rows_take_the_plain_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FEW", 21)
    model = one(nn.Linear(5, 7))
    names = [type(model(torch.randn(rows, 5)).grad_fn).__name__ for rows in (4, 5)]
    assert names == ["AddBackward0", "_LowRankBackward"]


def test_a_stack_of_one_has_the_bits_of_the_product() -> None:
    """With a scale that bfloat16 does not know."""
    x, A, B = torch.randn(2, 4, 5, dtype=torch.bfloat16), torch.randn(4, 5), torch.randn(7, 4)
    stack = stacks.Stacks([(A, B)], [7 / 3], 4, 1, None, None, x)
    assert torch.equal(stacks.products(x, [stack], 7, None), kernels.product(x, A, B, 7 / 3))
    close(stacks.plain_products(x, [stack], 7, None).float(), kernels.product(x, A, B, 7 / 3).float())
