"""Each method against its paper's formula, written here a second time: outputs, merged weights, parameter counts."""

from typing import Any

import models
import pytest
import torch
from models import output, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab
from trimtab import BitFitConfig, ConfigError, IA3Config, LNTuningConfig, PeftConfig, TargetError, get_peft_model


def attached(config: PeftConfig, tiny: models.Tiny | None = None) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """A model with a randomised adapter, its inputs, and the adapters' weights by site and name."""
    model, inputs = tiny or models.mlp()
    get_peft_model(model, config)
    randomise(model)
    own = {name.replace(".adapters.default", ""): p for name, p in model.named_parameters() if ".adapters." in name}
    return model, inputs, {name: p.detach() for name, p in own.items()}


def agrees(model: nn.Module, x: Tensor, expected: Tensor) -> None:
    """The site `first` of the MLP gives what the formula says, as an adapter and merged."""
    torch.testing.assert_close(model.first(x), expected, rtol=1e-5, atol=1e-6)
    model.merge_adapter()
    torch.testing.assert_close(F.linear(x, model.first.weight, model.first.bias), expected, rtol=1e-5, atol=1e-6)


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------------------ IA3


def test_ia3_scales_what_leaves_a_layer() -> None:
    model, inputs, own = attached(IA3Config(target_modules=["first"]))
    W, b = model.first.weight, model.first.bias
    l = own["first.scale"].flatten()  # noqa: E741
    agrees(model, inputs["x"], l * (inputs["x"] @ W.T + b))
    assert trained(model) == 7


def test_ia3_scales_what_enters_a_feedforward_layer() -> None:
    model, inputs, own = attached(IA3Config(target_modules=["first"], feedforward_modules=["first"]))
    W, b = model.first.weight, model.first.bias
    l = own["first.scale"].flatten()  # noqa: E741
    agrees(model, inputs["x"], (l * inputs["x"]) @ W.T + b)
    assert trained(model) == 5


def test_ia3_takes_the_papers_parts_by_itself() -> None:
    model, _, own = attached(IA3Config(), models.t5())
    layers, kv, ff = 2, 2 * 6, 24
    assert trained(model) == layers * (2 * kv + ff) + layers * (4 * kv + ff)  # the decoder attends twice
    assert model.peft_config["default"].feedforward_modules == ["wo"]
    assert own["encoder.block.0.layer.1.DenseReluDense.wo.scale"].shape == (1, 24)


def test_ia3_refuses_a_feedforward_module_that_is_no_target() -> None:
    with pytest.raises(ConfigError, match=r"'second' matches no target.*There is: first"):
        get_peft_model(models.mlp().model, IA3Config(target_modules=["first"], feedforward_modules=["second"]))
    with pytest.raises(TargetError, match="cannot be scaled"):
        get_peft_model(models.embeddings().model, IA3Config(target_modules=["token"], feedforward_modules=["token"]))


# ---------------------------------------------------------------------------------------------------------- norms


def test_layer_norm_tuning_trains_the_norms_own_values() -> None:
    model, _, own = attached(LNTuningConfig())
    x = torch.randn(3, 6)
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = normal * own["norm.replacement.weight"] + own["norm.replacement.bias"]
    torch.testing.assert_close(model.norm(x), expected, rtol=1e-5, atol=1e-6)
    assert trained(model) == 2 * 6


def test_layer_norm_tuning_finds_every_norm_whatever_its_class() -> None:
    model = get_peft_model(models.llama().model, LNTuningConfig())
    assert trained(model) == (2 * 2 + 1) * 16
    assert model.peft_config["default"].target_modules == ["input_layernorm", "norm", "post_attention_layernorm"]


@pytest.mark.parametrize("trains", [False, True])
def test_norms_that_pytorch_reads_without_calling_are_adapted_too(trains: bool) -> None:
    """nn.TransformerEncoderLayer's fast path, taken without gradients, hands the norms' weights to one kernel."""
    model, inputs, own = attached(LNTuningConfig(), models.encoder())
    plain, _ = models.encoder()
    for name, value in own.items():
        plain.get_parameter(name.replace(".replacement", "")).data.copy_(value)
    with torch.set_grad_enabled(trains):
        torch.testing.assert_close(output(model, inputs), output(plain, inputs), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- BitFit


def test_bitfit_trains_all_biases_and_nothing_else() -> None:
    model, inputs, own = attached(BitFitConfig())
    b = own["first.bias.value"]
    agrees(model, inputs["x"], inputs["x"] @ model.first.weight.T + b)
    assert trained(model) == 7 + 6 + 6 + 3  # first, second, norm, head


def test_bitfit_in_attention_only() -> None:
    model = get_peft_model(models.bert().model, BitFitConfig(target_modules="attention"))
    assert trained(model) == 2 * (3 * 16 + 16 + 16)  # query, key, value, output, its norm
    with pytest.raises(TargetError, match="none in attention"):
        get_peft_model(models.mlp().model, BitFitConfig(target_modules="attention"))


def test_bitfit_on_a_model_without_biases_is_refused() -> None:
    with pytest.raises(TargetError, match="biases, of which T5ForConditionalGeneration has none"):
        trimtab.get_peft_model(models.t5().model, BitFitConfig())
