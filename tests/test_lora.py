"""LoRA against its formula y = W x + b + s B A x, written out again here for every kind of layer."""

import copy
import math
from typing import Any

import models
import pytest
import torch
from battery import close, far, run, same_bits
from models import Tiny, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab import ConfigError, LoraConfig, QuantizedMergeWarning, get_peft_model, weights

X = torch.float64  # oracles compute exactly; the library is tested in float32


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(layer: nn.Module, **settings: Any) -> tuple[Any, Tensor, Tensor]:
    """A model of this one layer under randomised LoRA, and its A and B in float64."""
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["layer"], **settings}
    model = get_peft_model(One(layer).eval(), LoraConfig(**settings))
    randomise(model)
    adapter = model.layer.adapters["default"]
    ones = [1] * (adapter.A.dim() - 2)  # HF PEFT's B is a convolution with kernel 1
    assert adapter.B.shape[2:] == torch.Size(ones)
    return model, adapter.A.detach().to(X), adapter.B.detach().flatten(1).to(X)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


# ------------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = nn.Linear(5, 8, bias=bias), torch.randn(shape)
    W, b = layer.weight.detach().to(X), layer.bias.detach().to(X) if bias else 0
    model, A, B = adapted(layer)
    assert A.shape == (3, 5)
    assert B.shape == (8, 3)
    close(run(model, {"x": x}), (x.to(X) @ W.T + b + 7 / 3 * x.to(X) @ A.T @ B.T).float())


def test_rank_stabilised_scale() -> None:
    layer, x = nn.Linear(5, 8), torch.randn(4, 5)
    plain = layer(x).detach()
    model, A, B = adapted(layer, use_rslora=True, r=4)
    close(run(model, {"x": x}), (plain.to(X) + 7 / 2 * x.to(X) @ A.T @ B.T).float())  # sqrt(4) = 2


def test_embedding() -> None:
    layer, ids = nn.Embedding(11, 6), torch.tensor([[3, 10], [0, 3]])
    E = layer.weight.detach().to(X)
    model, A, B = adapted(layer)
    assert A.shape == (3, 11)
    assert B.shape == (6, 3)
    close(run(model, {"x": ids}), (E + 7 / 3 * (B @ A).T)[ids].float())


def test_padding_is_not_trained() -> None:
    """An embedding's padding row gets no gradient, and so does the adapter's part of it."""
    model, _, _ = adapted(nn.Embedding(11, 6, padding_idx=2))
    model(torch.tensor([[2, 3]])).sum().backward()
    moved = model.layer.adapters["default"].A.grad.any(0)
    assert moved.nonzero().flatten().tolist() == [3]


def test_embedding_that_scales_what_it_looks_up() -> None:
    """Gemma multiplies embeddings by sqrt(hidden size): the adapter's part must be scaled as well, or merging fails."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    layer, ids = Gemma3TextScaledWordEmbedding(11, 6, padding_idx=0, embed_scale=6**0.5), torch.tensor([[3, 10]])
    E = layer.weight.detach().to(X)
    model, A, B = adapted(layer)
    active = run(model, {"x": ids})
    close(active, ((E + 7 / 3 * (B @ A).T)[ids] * 6**0.5).float())
    model.merge_adapter()
    close(run(model, {"x": ids}), active)


CONVOLUTIONS = {
    "1d": (nn.Conv1d, {"kernel_size": 3}),
    "1d-same": (nn.Conv1d, {"kernel_size": 3, "padding": "same", "dilation": 2}),
    "1d-valid-circular": (nn.Conv1d, {"kernel_size": 2, "padding": "valid", "padding_mode": "circular"}),
    "1d-same-reflect": (nn.Conv1d, {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"}),
    "2d": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)}),
    "2d-no-bias": (nn.Conv2d, {"kernel_size": 3, "bias": False}),
    "2d-replicate": (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"}),
    "3d": (nn.Conv3d, {"kernel_size": (2, 3, 1), "stride": (1, 2, 1), "padding": (1, 0, 2)}),
    "3d-circular": (nn.Conv3d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
}


@pytest.mark.parametrize(("kind", "settings"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution(kind: Any, settings: dict[str, Any]) -> None:
    """B A, reshaped to the kernel, is added to the kernel: a fresh layer of PyTorch with that sum is the oracle."""
    layer = kind(4, 6, **settings)
    dimensions = int(kind.__name__[4])
    x = torch.randn(2, 4, *(8, 7, 6)[:dimensions])
    oracle = copy.deepcopy(layer).to(X)
    model, A, B = adapted(layer)
    assert A.shape == (3, 4, *layer.kernel_size)
    assert B.shape == (6, 3)
    with torch.no_grad():
        oracle.weight += 7 / 3 * torch.einsum("or,ri...->oi...", B, A)
    active = run(model, {"x": x})
    close(active, run(oracle, {"input": x.to(X)}).float())
    model.merge_adapter()
    close(run(model, {"x": x}), active)
    # without a batch dimension, as PyTorch's own convolutions allow
    model.unmerge_adapter()
    close(run(model, {"x": x[0]}), active[0])


def test_grouped_convolution() -> None:
    """A sees all channels, B mixes each group's share of the r: as HF PEFT does, whose files must stay readable."""
    layer, x = nn.Conv2d(4, 6, 3, groups=2, padding=1), torch.randn(2, 4, 5, 5)
    plain = layer(x).detach().to(X)
    model, A, B = adapted(layer, r=4)
    assert A.shape == (4, 4, 3, 3)
    assert B.shape == (6, 2)
    h = F.conv2d(x.to(X), A, padding=1)
    upper, lower = torch.einsum("nrhw,or->nohw", h[:, :2], B[:3]), torch.einsum("nrhw,or->nohw", h[:, 2:], B[3:])
    close(run(model, {"x": x}), (plain + 7 / 4 * torch.cat([upper, lower], 1)).float())


def test_grouped_convolution_wants_a_rank_it_can_share_out() -> None:
    with pytest.raises(ConfigError, match="2 groups: its rank must be a multiple of that, not 3"):
        adapted(nn.Conv2d(4, 6, 3, groups=2), r=3)


def test_gpt2_conv1d() -> None:
    """It stores (in, out). fan_in_fan_out is found out, not asked for."""
    from transformers.pytorch_utils import Conv1D

    layer, x = Conv1D(8, 5), torch.randn(2, 3, 5)
    W, b = layer.weight.detach().to(X), layer.bias.detach().to(X)
    model, A, B = adapted(layer)
    assert A.shape == (3, 5)
    assert B.shape == (8, 3)
    assert model.peft_config["default"].fan_in_fan_out is True
    close(run(model, {"x": x}), (x.to(X) @ W + b + 7 / 3 * x.to(X) @ A.T @ B.T).float())
    model.merge_adapter()
    close(layer.weight, (W + 7 / 3 * (B @ A).T).float())


def test_float32_products_are_not_kept_on_a_half_precision_base() -> None:
    """The input saved for backward is the bfloat16 one that the base layer saves anyway."""
    model, _, _ = adapted(nn.Linear(5, 8).bfloat16())
    saved: list[Tensor] = []
    x = torch.randn(4, 5, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        assert model(x).dtype == torch.bfloat16
    inputs = [tensor for tensor in saved if len(tensor) == len(x)]
    assert inputs
    assert all(tensor.dtype == torch.bfloat16 for tensor in inputs)


def test_gradients_by_finite_differences_through_two_stacked_layers() -> None:
    """Every entry of every A and B and of the input, in float64, on layers that are not square."""
    model, inputs = models.mlp()
    model.double()
    get_peft_model(model, LoraConfig(r=2, lora_alpha=5, target_modules=["first", "second"], bias="all"))
    randomise(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4 + 4  # A and B of two layers; the biases of four modules
    x = inputs["x"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *trained))


# -------------------------------------------------------------------------------------------------------- the config


def test_patterns_give_ranks_and_alphas_of_their_own() -> None:
    model, inputs = models.mlp()
    first, second, x = model.first, model.second, inputs["x"]
    plain = first(x).detach(), second(torch.ones(7)).detach()
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["first", "second", "head"], rank_pattern={"first": 2},
        alpha_pattern={"f.*": 6, "second": 3},
    )  # fmt: skip
    randomise(get_peft_model(model, config))
    one, two, three = (m.adapters["default"] for m in (first, second, model.head))
    assert (one.A.shape[0], two.A.shape[0], three.A.shape[0]) == (2, 3, 3)
    close(first(x), plain[0] + 6 / 2 * x @ one.A.T @ one.B.T)
    close(second(torch.ones(7)), plain[1] + 3 / 3 * torch.ones(7) @ two.A.T @ two.B.T)
    with model.disable_adapter():
        base = model.head(torch.ones(6))
    close(model.head(torch.ones(6)), base + 6 / 3 * torch.ones(6) @ three.A.T @ three.B.T)


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_target_is_an_error(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting} has the key 'frist'.*Did you mean 'first'"):
        get_peft_model(models.mlp().model, LoraConfig(target_modules=["first"], **{setting: {"frist": 2}}))


def test_parameter_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """r (in + out) for each layer; on the MLP 5 -> 7 -> 6, and 48 + 2 * 6 + 24 + 21 base parameters in all."""
    model, _ = models.mlp()
    base = (5 * 7 + 7) + (7 * 6 + 6) + 2 * 6 + (6 * 3 + 3)
    trained = 2 * (5 + 7) + 2 * (7 + 6)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["first", "second"]))
    assert model.get_nb_trainable_parameters() == (trained, base + trained)
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {trained} || all params: {base + trained} || "
        f"trainable%: {100 * trained / (base + trained):.4f}\n"
    )


def test_parameter_counts_of_trained_copies_and_biases() -> None:
    lora = 2 * (5 + 7)
    for settings, extra in [
        ({"modules_to_save": ["head"]}, 6 * 3 + 3),
        ({"bias": "lora_only"}, 7),
        ({"bias": "all"}, 7 + 6 + 6 + 3),  # first, second, norm, head
        ({"bias": "all", "modules_to_save": ["head"]}, 7 + 6 + 6 + 6 * 3 + 3),  # the head's own bias is a copy already
    ]:
        model = get_peft_model(models.mlp().model, LoraConfig(r=2, target_modules=["first"], **settings))
        assert model.get_nb_trainable_parameters()[0] == lora + extra, settings


@pytest.mark.parametrize(("bias", "biased"), [("all", ["first", "second", "norm", "head"]), ("lora_only", ["first"])])
def test_trained_biases_replace_the_base_s(bias: Any, biased: list[str]) -> None:
    """The oracle is a plain model in which those biases are the trained ones and W is W + s B A."""
    model, inputs = models.mlp()
    oracle, _ = models.mlp()
    get_peft_model(model, LoraConfig(r=2, lora_alpha=5, target_modules=["first"], bias=bias))
    randomise(model)
    adapter = model.first.adapters["default"]
    with torch.no_grad():
        oracle.first.weight += 5 / 2 * adapter.B @ adapter.A
        for name in biased:
            oracle.get_submodule(name).bias.copy_(model.get_submodule(name).adapters["default"].bias.value)
    close(run(model, inputs), run(oracle, inputs))
    model.merge_and_unload()
    for name, value in oracle.state_dict().items():
        close(model.state_dict()[name], value)


def test_trained_biases_of_convolutions_and_norms() -> None:
    """After a convolution the channels are the second dimension, or the first where there is no batch."""
    for layer, x in [
        (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 7)),
        (nn.Conv2d(4, 6, 3), torch.randn(4, 5, 5)),
        (nn.Conv3d(4, 6, 3), torch.randn(2, 4, 3, 4, 5)),
    ]:
        oracle = copy.deepcopy(layer).to(X)
        model, A, B = adapted(layer, bias="lora_only")
        with torch.no_grad():
            oracle.weight += 7 / 3 * torch.einsum("or,ri...->oi...", B, A)
            oracle.bias.copy_(layer.adapters["default"].bias.value)
        close(run(model, {"x": x}), run(oracle, {"input": x.to(X)}).float())
    net = nn.Sequential(nn.Conv1d(4, 6, 3), nn.GroupNorm(2, 6), nn.BatchNorm1d(6)).eval()
    oracle = copy.deepcopy(net)
    get_peft_model(net, LoraConfig(r=3, target_modules=["0"], bias="all", init_lora_weights=True))
    with torch.no_grad():
        for place in (1, 2):
            value = net[place].adapters["default"].bias.value
            oracle[place].bias.copy_(value.normal_())
    x = torch.randn(2, 4, 7)
    close(net(x), oracle(x))


# ------------------------------------------------------------------------------------------------ dropout and init


def test_dropout_acts_on_the_input_of_a_and_in_training_only() -> None:
    """What is dropped shows where A and B are the identity: y - W x - b is then s drop(x)."""
    layer, x = nn.Linear(5, 5), torch.randn(64, 5)
    plain = layer(x).detach()
    model = get_peft_model(One(layer), LoraConfig(r=5, lora_alpha=5, lora_dropout=0.4, target_modules=["layer"])).eval()
    for name in "AB":
        nn.init.eye_(getattr(model.layer.adapters["default"], name))
    close(run(model, {"x": x}), plain + x)
    model.train()
    torch.manual_seed(5)
    added = run(model, {"x": x}) - plain
    dropped = added.abs() < 1e-6
    assert 0.2 < dropped.float().mean() < 0.6  # 320 draws: 6 standard errors are 0.16
    kept = round(0.6 * 2**16) / 2**16  # dropout draws 16 bits
    close(added, torch.where(dropped, 0, x / kept))
    torch.manual_seed(5)
    assert torch.equal(run(model, {"x": x}) - plain, added)
    assert not torch.equal(run(model, {"x": x}) - plain, added)


def test_dropout_keeps_the_expectation() -> None:
    """The mean of n draws lies within 6 standard errors of the result without dropout."""
    layer, x = nn.Linear(5, 8), torch.randn(5)
    model, _, _ = adapted(layer, lora_dropout=0.4)
    expected = run(model, {"x": x})
    model.train()
    draws = run(model, {"x": x.expand(20_000, 5)})
    error = draws.std(0) / 20_000**0.5
    assert ((draws.mean(0) - expected).abs() < 6 * error + 1e-6).all()
    assert (error > 1e-4).all()


def test_default_init_is_that_of_a_linear_layer() -> None:
    """A uniform on +-1 / sqrt(in): standard deviation 1 / sqrt(3 in). B zero."""
    model = get_peft_model(One(nn.Linear(400, 60)), LoraConfig(r=50, target_modules=["layer"]))
    A, B = (getattr(model.layer.adapters["default"], name) for name in "AB")
    assert not B.any()
    assert A.abs().max() <= 1 / 20
    assert A.abs().max() > 0.999 / 20
    assert abs(A.std().item() * 20 * math.sqrt(3) - 1) < 0.02  # 20,000 draws: 6 standard errors are 0.02
    assert abs(A.mean().item()) < 6 / 20 / math.sqrt(3 * A.numel())


def test_gaussian_init() -> None:
    """A normal with standard deviation 1 / r."""
    config = LoraConfig(r=50, target_modules=["layer"], init_lora_weights="gaussian")
    model = get_peft_model(One(nn.Linear(400, 60)), config)
    A, B = (getattr(model.layer.adapters["default"], name) for name in "AB")
    assert not B.any()
    assert abs(A.std().item() * 50 - 1) < 0.03  # 6 / sqrt(2 n)
    kurtosis = ((A - A.mean()) ** 4).mean() / A.var() ** 2
    assert abs(kurtosis.item() - 3) < 6 * math.sqrt(24 / A.numel())  # a uniform's is 1.8


@pytest.mark.parametrize("layer", [nn.Linear(400, 60), nn.Conv1d(20, 60, 20)], ids=["linear", "conv"])
def test_init_of_convolutions_counts_the_kernel_as_inputs(layer: nn.Module) -> None:
    model = get_peft_model(One(layer), LoraConfig(r=50, target_modules=["layer"]))
    A = model.layer.adapters["default"].A
    assert 0.999 / 20 < A.abs().max() <= 1 / 20  # 20 channels times kernel 20


def test_init_of_embeddings() -> None:
    """There A is zero, since its columns belong to tokens, and B standard normal."""
    model = get_peft_model(One(nn.Embedding(60, 400)), LoraConfig(r=50, target_modules=["layer"]))
    A, B = (getattr(model.layer.adapters["default"], name) for name in "AB")
    assert not A.any()
    assert abs(B.std().item() - 1) < 0.03


def test_init_without_identity() -> None:
    layer, x = nn.Linear(5, 8), torch.randn(4, 5)
    plain = layer(x).detach()
    config = LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False)
    far(get_peft_model(One(layer), config)(x), plain)


def test_the_seed_decides_the_init() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(9)
        model = get_peft_model(models.mlp().model, LoraConfig(r=2, target_modules=["first"]))
        drawn.append(model.first.adapters["default"].A)
    assert same_bits(*drawn)


@pytest.mark.parametrize(
    "settings",
    [{"r": 0}, {"r": -1}, {"r": 2.5}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1}, {"bias": "some"},
     {"init_lora_weights": "pisa"}, {"lora_alpha": "high"}, {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")}],
    ids=str,
)  # fmt: skip
def test_values_out_of_range(settings: dict[str, Any]) -> None:
    (name, value), *_ = settings.items()
    with pytest.raises(ConfigError, match=f"^LoraConfig: {name}={value!r}: "):
        LoraConfig(**settings)


def test_a_rank_of_zero_in_a_pattern() -> None:
    with pytest.raises(ConfigError, match="rank"):
        get_peft_model(models.mlp().model, LoraConfig(target_modules=["first"], rank_pattern={"first": 0}))


# -------------------------------------------------------------------------------------------------- quantized layers


def dense(layer: Any) -> Tensor:
    """The weight that a quantized layer stands for, by bitsandbytes' own functions; before its first call."""
    import bitsandbytes.functional as bnb

    if type(layer.weight).__name__ == "Params4bit":
        return bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.data.float() * (layer.weight.SCB / 127)[:, None]


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Everything that the quantized layers hold: packed weights, scales, biases."""
    found = {}
    for name in ("first", "second"):
        layer: Any = model.get_submodule(name)
        found |= {f"{name}.weight": layer.weight.data, f"{name}.bias": layer.bias.data}
        if state := getattr(layer.weight, "quant_state", None):
            found[f"{name}.absmax"] = state.absmax
            if state.nested:
                found |= {f"{name}.offset": state.offset.reshape(1), f"{name}.absmax2": state.state2.absmax}
        if hasattr(layer, "state") and layer.state.SCB is not None:
            found[f"{name}.SCB"] = layer.state.SCB
    return {name: value.clone() for name, value in found.items()}


KINDS = {
    "nf4": models.quantized4,
    "nf4-single": lambda: models.quantized4(compress_statistics=False),
    "fp4": lambda: models.quantized4("fp4"),
    "int8": models.quantized8,
}
quantized = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)


def quantized_lora(tiny: Tiny, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], **settings}
    model = get_peft_model(tiny.model, LoraConfig(**settings))
    randomise(model, scale=0.1)
    return model, tiny.inputs


@quantized
def test_a_quantized_layer_computes_with_its_dequantized_weight(build: Any) -> None:
    """The base's kernel rounds, in ways of its own; what the adapter adds is exact."""
    pytest.importorskip("bitsandbytes")
    tiny = build()
    W, x = dense(tiny.model.first), tiny.inputs["x"]
    model, _ = quantized_lora(tiny)
    with model.disable_adapter():
        plain = model.first(x).detach()
    adapter = model.first.adapters["default"]
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    y = model.first(x).detach()
    close(y, plain + 6 / 4 * x @ adapter.A.T @ adapter.B.T)
    expected = x @ (W + 6 / 4 * adapter.B @ adapter.A).T + model.first.bias
    assert (y - expected).norm() < 0.03 * expected.norm()


@quantized
def test_training_on_quantized_layers(build: Any) -> None:
    pytest.importorskip("bitsandbytes")
    model, inputs = quantized_lora(build())
    before = stored(model)
    model(**inputs).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if ".adapters." in name
    }
    assert model.first.adapters["default"].A.grad.norm() > 0
    assert all(same_bits(value, before[name]) for name, value in stored(model).items() if name in before)


@pytest.mark.parametrize("nested", [True, False])
def test_weights_packed_for_inference_are_unpacked_while_adapters_are_attached(nested: bool) -> None:
    """Some processors pack 4-bit weights at the first evaluation, rounding scales, and no gradient passes then."""
    bnb = pytest.importorskip("bitsandbytes")
    if not bnb.functional.has_avx512bf16():
        pytest.skip("this processor does not pack 4-bit weights for inference")
    tiny = models.quantized4(compress_statistics=nested, repacks=True)
    W = {name: dense(layer) for name, layer in tiny.model.named_children() if name != "head"}
    packed = run(tiny.model, tiny.inputs)
    before = stored(tiny.model)
    model, inputs = quantized_lora(tiny)
    run(model, inputs)
    model(**inputs).square().sum().backward()  # in eval mode
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    h = inputs["x"]
    for name, weight in W.items():
        layer, read = model.get_submodule(name), weights.read(model.get_submodule(name))
        assert (read - weight).norm() < 2**-8 * weight.norm()  # its scales are bfloat16 by now
        adapter = layer.adapters["default"]
        h = torch.tanh(h @ (read + 6 / 4 * adapter.B @ adapter.A).T + layer.bias)
    model.head(h).square().sum().backward()
    assert len(found) == 4
    for name, gradient in found.items():
        close(gradient, model.get_parameter(name).grad)
    model.unload()
    assert same_bits(run(model, inputs), packed)
    after = stored(model)
    assert all(same_bits(after[name], value) for name, value in before.items())


@quantized
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
def test_merging_requantizes_and_warns_and_unmerging_restores_the_bytes(build: Any, called: bool) -> None:
    """Called or not before: bitsandbytes moves scales and packs weights anew at the first call."""
    pytest.importorskip("bitsandbytes")
    tiny = build()
    W, state = dense(tiny.model.first), getattr(tiny.model.first.weight, "quant_state", None)
    precision = state.dtype if state else None
    model, inputs = quantized_lora(tiny)
    active = run(copy.deepcopy(model), inputs)
    if called:
        run(model, inputs)
    before, kind = stored(model), type(model.first)
    adapter = model.first.adapters["default"]
    with pytest.warns(QuantizedMergeWarning, match="2 quantized weights"):
        model.merge_adapter()
    folded = W + 6 / 4 * (adapter.B @ adapter.A).detach()
    if called:  # repacking has rounded W a little, so that single weights may fall to the other side
        best = (requantized(model.first, folded) - folded).norm()
        assert (dense(model.first) - folded).norm() < 1.05 * best
    else:
        assert same_bits(dense(model.first), requantized(model.first, folded))
    assert type(model.first.weight).__name__ in ("Params4bit", "Int8Params")
    if precision:
        assert model.first.weight.quant_state.dtype == precision
    assert not model.first.weight.requires_grad
    merged = run(model, inputs)
    assert (merged - active).norm() < 0.3 * active.norm()  # 4 bits are coarse
    with model.disable_adapter():  # merging again would warn again, and round again
        assert same_bits(run(model, inputs), run(build().model, inputs))
    assert same_bits(run(model, inputs), merged)
    model.unmerge_adapter()
    assert type(model.first) is kind
    assert same_bits(run(model, inputs), active)
    if called:
        after = stored(model)
        assert list(after) == list(before)
        assert all(same_bits(after[name], value) for name, value in before.items())


def requantized(layer: Any, weight: Tensor) -> Tensor:
    """What is left of a dense weight after bitsandbytes has quantized it as this layer does."""
    import bitsandbytes as bnb

    if type(layer.weight).__name__ == "Params4bit":
        old = layer.weight.quant_state
        packed, state = bnb.functional.quantize_4bit(
            weight, quant_type=old.quant_type, blocksize=old.blocksize, compress_statistics=old.nested
        )
        return bnb.functional.dequantize_4bit(packed, state)
    fresh = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False).to("cpu")
    return fresh.data.float() * (fresh.SCB / 127)[:, None]


@quantized
def test_unloading_a_quantized_model(build: Any) -> None:
    pytest.importorskip("bitsandbytes")
    tiny = build()
    expected, kind = run(tiny.model, tiny.inputs), type(tiny.model.first)
    before = stored(tiny.model)
    model, inputs = quantized_lora(tiny)
    model.unload()
    assert type(model.first) is kind
    assert same_bits(run(model, inputs), expected)
    assert all(same_bits(value, before[name]) for name, value in stored(model).items())


@quantized
def test_merge_and_unload_of_a_quantized_model(build: Any) -> None:
    pytest.importorskip("bitsandbytes")
    tiny = build()
    kind, keys = type(tiny.model.first), set(tiny.model.state_dict())
    model, inputs = quantized_lora(tiny)
    with pytest.warns(QuantizedMergeWarning):
        model.merge_adapter()
    merged = run(model, inputs)
    with pytest.warns(QuantizedMergeWarning) as seen:
        plain = model.merge_and_unload()
    assert [warning.filename for warning in seen] == [__file__]
    assert type(plain.first) is kind
    assert set(plain.state_dict()) == keys
    close(run(plain, inputs), merged)


@quantized
def test_deepcopy_of_a_quantized_model(build: Any) -> None:
    pytest.importorskip("bitsandbytes")
    model, inputs = quantized_lora(build())
    copied = copy.deepcopy(model)
    assert same_bits(run(copied, inputs), run(model, inputs))


def test_counts_of_4_bit_models_are_of_what_the_weights_stand_for() -> None:
    pytest.importorskip("bitsandbytes")
    tiny = models.quantized4()
    base = (64 * 128 + 128) + (128 * 64 + 64) + (64 * 3 + 3)
    model, _ = quantized_lora(tiny)
    trained = 2 * 4 * (64 + 128)
    assert model.get_nb_trainable_parameters() == (trained, base + trained)
