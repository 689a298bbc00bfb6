"""HiRA against its formula: a low-rank product times the weight, elementwise."""

import models
import pytest
import torch
from test_formulas import agrees, attached, trained
from torch.nn import functional as F

from trimtab import ConfigError, HiraConfig, LoraConfig, get_peft_model, weights


def test_hira_multiplies_the_weight_by_a_low_rank_product() -> None:
    model, inputs, own = attached(HiraConfig(r=2, target_modules=["first"]))
    W = model.first.weight.detach().clone()
    change = W * (own["first.B"] @ own["first.A"])
    assert torch.linalg.matrix_rank(change) == 5  # all that W has, from a product of rank 2
    agrees(model, inputs["x"], F.linear(inputs["x"], W + change, model.first.bias))
    assert trained(model) == 2 * (5 + 7)


def test_hira_on_a_convolution() -> None:
    """On a grouped one, too: B A has the shape of the weight, which holds each group's inputs only."""
    model, _, own = attached(HiraConfig(r=3, target_modules=["plane"]), models.convolutions(groups=2))
    W = model.plane.weight.detach().clone()
    product = torch.einsum("orxy,rikl->oikl", own["plane.B"], own["plane.A"])
    x = torch.randn(2, 12, 7, 10)
    padded = F.pad(x, (1, 1, 2, 2), mode="reflect")
    expected = F.conv2d(padded, W + W * product, model.plane.bias, dilation=(2, 1), groups=2)
    torch.testing.assert_close(model.plane(x), expected, rtol=1e-4, atol=1e-5)
    assert trained(model) == 3 * (6 * 3 * 2 + 8)


def test_hira_s_weight_is_the_base_s_own_beside_another_adapter() -> None:
    model, inputs, own = attached(HiraConfig(r=2, target_modules=["first"]))
    W, x = model.first.weight.detach().clone(), inputs["x"]
    model.add_adapter("lora", LoraConfig(r=1, init_lora_weights=False, target_modules=["first"]))
    lora = model.first.adapters["lora"]
    expected = F.linear(x, W + W * (own["first.B"] @ own["first.A"]) + 8 * lora.B @ lora.A, model.first.bias)
    for order in (["default", "lora"], ["lora", "default"]):
        model.set_adapter(order)
        torch.testing.assert_close(model.first(x), expected, rtol=1e-5, atol=1e-5)
        model.merge_adapter()
        torch.testing.assert_close(F.linear(x, model.first.weight, model.first.bias), expected, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()


@pytest.mark.parametrize("build", models.QUANTIZED.values(), ids=models.QUANTIZED)
def test_hira_on_a_quantized_layer_multiplies_the_dequantized_weight(build: object) -> None:
    pytest.importorskip("bitsandbytes")
    model, inputs, own = attached(HiraConfig(r=2, target_modules=["first"]), build())
    x = inputs["x"]
    with model.disable_adapter():
        base = model.first(x)
    change = weights.read(model.first).float() * (own["first.B"] @ own["first.A"])
    torch.testing.assert_close(model.first(x), base + x @ change.T, rtol=1e-3, atol=1e-3)


def test_hira_s_gaussian_start() -> None:
    torch.manual_seed(0)
    model = get_peft_model(models.bert().model, HiraConfig(r=8, init_weights="gaussian"))
    drawn = torch.cat([p.flatten() for name, p in model.named_parameters() if name.endswith(".A")])
    assert drawn.std().item() == pytest.approx(1 / 8, rel=0.1)


def test_hira_refuses_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(ConfigError, match=r"rank_pattern has the key 'frst'.* mean 'first'"):
        get_peft_model(models.mlp().model, HiraConfig(r=2, rank_pattern={"frst": 1}, target_modules=["first"]))
