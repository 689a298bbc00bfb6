"""Bottleneck adapters against y + s U act(D y + d) + u, and where each variant puts them."""

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from battery import close, far, run, same_bits
from models import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab import BottleneckConfig, ConfigError, MergeError, PeftModel, TargetError, get_peft_model


def adapted(model: nn.Module, **settings: Any) -> Any:
    get_peft_model(model, BottleneckConfig(**settings))
    randomise(model)
    return model


def weights_of(site: Any) -> tuple[Tensor, ...]:
    own = site.adapters["default"]
    return own.down.detach(), own.down_bias.detach(), own.up.detach(), own.up_bias.detach()


@pytest.mark.parametrize(
    ("name", "act"),
    [("relu", lambda h: h * (h > 0)), ("silu", lambda h: h / (1 + torch.exp(-h))), ("tanh", torch.tanh),
     ("gelu", lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2), ("leaky_relu", lambda h: torch.where(h > 0, h, h / 100))],
)  # fmt: skip
def test_the_formula(name: Any, act: Any) -> None:
    """r = 7 / 2 = 3, and 2 n r + r + n parameters per site."""
    model, inputs = models.mlp()
    y = model.first(inputs["x"]).detach()
    adapted(model, target_modules=["first"], reduction_factor=2, non_linearity=name, scaling=0.7)
    D, d, U, u = weights_of(model.first)
    assert D.shape == (3, 7)
    close(model.first(inputs["x"]), y + 0.7 * (act(y @ D.T + d) @ U.T + u))
    assert model.get_nb_trainable_parameters()[0] == 2 * 7 * 3 + 3 + 7


def test_without_the_residual_and_with_dropout() -> None:
    model, inputs = models.mlp()
    y = model.first(inputs["x"]).detach()
    adapted(model, target_modules=["first"], reduction_factor=2, residual=False, dropout=0.5, non_linearity="tanh")
    D, d, U, u = weights_of(model.first)
    close(model.first(inputs["x"]), torch.tanh(y @ D.T + d) @ U.T + u)
    model.train()
    torch.manual_seed(5)
    got = model.first(inputs["x"])
    torch.manual_seed(5)
    close(got, torch.tanh(F.dropout(y, 0.5) @ D.T + d) @ U.T + u)


@pytest.mark.parametrize("where", ["before", "after"])
def test_layer_norm(where: Any) -> None:
    model, inputs = models.mlp()
    y = model.first(inputs["x"]).detach()
    adapted(model, target_modules=["first"], reduction_factor=2, layer_norm=where, non_linearity="tanh")
    D, d, U, u = weights_of(model.first)
    norm = model.first.adapters["default"].norm

    def normed(h: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias

    h = normed(y) if where == "before" else y
    h = torch.tanh(h @ D.T + d) @ U.T + u
    close(model.first(inputs["x"]), y + (normed(h) if where == "after" else h))


def test_parallel_takes_the_input_of_the_part() -> None:
    """On OPT the part has no module of its own: its two layers are the block's."""
    model, inputs = models.opt()
    layer = model.model.decoder.layers[0]
    seen: dict[str, Tensor] = {}
    layer.fc1.register_forward_hook(lambda _module, args, _y: seen.update(x=args[0]))
    layer.fc2.register_forward_hook(lambda _module, args, y: seen.update(inner=args[0], y=y))
    adapted(model, variant="parallel", reduction_factor=4, non_linearity="tanh")
    run(model, inputs)
    D, d, U, u = weights_of(layer.fc2)
    own = seen["inner"] @ layer.fc2.weight.T + layer.fc2.bias
    close(seen["y"], own + 4.0 * (torch.tanh(seen["x"] @ D.T + d) @ U.T + u))
    assert layer.fc1.adapters["default"].x is None  # kept for the call, not for longer


def test_parallel_beside_a_named_module() -> None:
    model, inputs = models.mlp()
    x, y = inputs["x"], model.first(inputs["x"]).detach()
    adapted(model, variant="parallel", target_modules=["first"], reduction_factor=2, non_linearity="tanh", scaling=1)
    D, d, U, u = weights_of(model.first)
    assert (D.shape, U.shape) == ((2, 5), (7, 2))
    close(model.first(x), y + torch.tanh(x @ D.T + d) @ U.T + u)


def test_modules_that_return_tuples() -> None:
    """Attention returns its output and its weights: the output is adapted, the rest left alone."""
    model, inputs = models.llama(attn_implementation="eager")
    base = model(**inputs, output_attentions=True)
    attention = model.model.layers[0].self_attn
    seen: dict[str, Any] = {}
    attention.register_forward_hook(lambda _module, _args, y: seen.update(y=y))
    adapted(model, target_modules=r".*0\.self_attn", reduction_factor=4)
    found = model(**inputs, output_attentions=True)
    assert isinstance(seen["y"], tuple)
    assert same_bits(found.attentions[0], base.attentions[0])
    far(found.logits, base.logits)


PARTS = {  # of one layer: where attention ends, where the feed-forward part begins and ends
    "llama": ("model.layers.{}", ["self_attn.o_proj"], "mlp.gate_proj", "mlp.down_proj"),
    "bert": ("bert.encoder.layer.{}", ["attention.output.dense"], "intermediate.dense", "output.dense"),
    "gpt2": ("transformer.h.{}", ["attn.c_proj"], "mlp.c_fc", "mlp.c_proj"),
    "opt": ("model.decoder.layers.{}", ["self_attn.out_proj"], "fc1", "fc2"),
    "vit": ("vit.layers.{}", ["attention.o_proj"], "mlp.fc1", "mlp.fc2"),
}


def sites(model: Any) -> set[str]:
    return {status.name for status in model.get_layer_status()}


@pytest.mark.parametrize("name", PARTS)
def test_every_architecture_has_its_parts_found(name: str) -> None:
    layer, attention, first, last = PARTS[name]
    model, inputs = models.TRANSFORMERS[name]()
    base = run(model, inputs)
    feedforward = {f"{layer.format(i)}.{last}" for i in (0, 1)}
    both = feedforward | {f"{layer.format(i)}.{end}" for i in (0, 1) for end in attention}
    entries = {f"{layer.format(i)}.{first}" for i in (0, 1)}
    for variant, expected in [("pfeiffer", feedforward), ("houlsby", both), ("parallel", feedforward | entries)]:
        adapted(model, variant=variant, reduction_factor=4)
        assert sites(model) == expected
        far(run(model, inputs), base)
        model.unload()
    adapted(model, variant="houlsby", reduction_factor=4, drop_first=1)
    assert sites(model) == {site for site in both if ".1." in site}


def test_t5_has_cross_attention_and_two_stacks() -> None:
    model, _ = models.t5()
    adapted(model, variant="houlsby", reduction_factor=4, drop_first=1)
    assert sites(model) == {
        "encoder.block.1.layer.0.SelfAttention.o", "encoder.block.1.layer.1.DenseReluDense.wo",
        "decoder.block.1.layer.0.SelfAttention.o", "decoder.block.1.layer.1.EncDecAttention.o",
        "decoder.block.1.layer.2.DenseReluDense.wo",
    }  # fmt: skip
    model, inputs = models.t5(feed_forward_proj="gated-gelu")
    base = run(model, inputs)
    adapted(model, variant="parallel", reduction_factor=4)
    assert "encoder.block.0.layer.1.DenseReluDense.wi_0" in sites(model)
    far(run(model, inputs), base)


def test_near_identity_start() -> None:
    """Houlsby's: both matrices normal, deviation 0.01, cut off at twice that."""
    model, inputs = models.mlp()
    base = run(model, inputs)
    get_peft_model(model, BottleneckConfig(target_modules=["first"], reduction_factor=1, near_identity=True))
    own = model.first.adapters["default"]
    assert 0 < own.up.abs().max() <= 0.02
    assert 0 < (run(model, inputs) - base).abs().max() < 1e-2


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("variant", ["houlsby", "parallel"])
def test_gradient_checkpointing_gives_the_same_gradients(variant: Any) -> None:
    """Also where one adapter hands its input to another: recomputing does that again."""
    found = []
    for checkpointing in (False, True):
        model, inputs = models.llama()
        adapted(model, variant=variant, reduction_factor=4)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*found, strict=True):
        close(recomputed, plain)


def test_a_saved_adapter_has_keys_of_its_own(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = adapted(models.mlp().model, target_modules=["first"], layer_norm="after", reduction_factor=7)
    model.save_pretrained(tmp_path)
    shapes = {key: tuple(value.shape) for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    start = "base_model.model.first.bottleneck_"
    assert shapes == {
        f"{start}down": (1, 7), f"{start}down_bias": (1,), f"{start}up": (7, 1), f"{start}up_bias": (7,),
        f"{start}norm.weight": (7,), f"{start}norm.bias": (7,),
    }  # fmt: skip
    loaded = PeftModel.from_pretrained(models.mlp().model, tmp_path)
    assert loaded.peft_config["default"].scaling == 1.0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"reduction_factor": 17}, ConfigError, r"is 16 wide: reduction_factor=17 leaves nothing. Closest: 16"),
        ({"drop_first": 2}, ConfigError, "drop_first=2 leaves no layer. Closest: 1"),
        ({"variant": "parallel", "residual": False}, ConfigError, "Set residual=True, or another variant"),
        ({"variant": "pfeifer"}, ConfigError, "'houlsby', 'pfeiffer' or 'parallel'"),
        ({"variant": "parallel", "target_modules": ["fc1", "fc2"]}, TargetError, r"target only .*fc2"),
        ({"target_modules": ["activation_fn"]}, TargetError, "is a ReLU, which BottleneckConfig cannot adapt"),
    ],
)  # fmt: skip
def test_nonsense(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        get_peft_model(models.opt().model, BottleneckConfig(**settings))


def test_models_without_such_parts() -> None:
    with pytest.raises(TargetError, match=r"Mlp has no numbered layers with a feed-forward part.*Give target_modules"):
        get_peft_model(models.mlp().model, BottleneckConfig())


def test_merging_says_why_not() -> None:
    model = adapted(models.mlp().model, target_modules=["first"], reduction_factor=2)
    with pytest.raises(MergeError, match=r"a non-linearity lies between its two matrices\. Keep the adapter attached"):
        model.merge_adapter()
