"""PEANuT against its formula, column by column of the weight."""

from typing import Any

import models
import pytest
import torch
from test_formulas import agrees, attached, trained
from torch.nn import functional as F

from trimtab import ConfigError, LoraConfig, PeanutConfig


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_peanut_s_change_is_a_network_of_the_weight(depth: int) -> None:
    model, inputs, own = attached(PeanutConfig(r=2, depth=depth, scaling=0.5, target_modules=["first"]))
    assert trained(model) == 2 * 7 * 2 + 2 * depth * 2 * 2
    W = model.first.weight.detach().clone()
    columns = []
    for w in W.T:
        layers = [F.relu(own["first.A"] @ w)]
        for i in range(depth):
            layers.append(F.relu(own[f"first.encoders.{i}"] @ layers[-1]))
        h = layers[-1]
        for i in range(depth):
            h = F.relu(own[f"first.decoders.{i}"] @ h) + layers[depth - 1 - i]
        columns.append(0.5 * own["first.B"] @ h)
    change = torch.stack(columns, 1)
    assert change.norm() > 0.1
    agrees(model, inputs["x"], F.linear(inputs["x"], W + change, model.first.bias.detach()))


def test_peanut_reads_the_base_s_own_weight_beside_another_adapter() -> None:
    model, inputs, own = attached(PeanutConfig(r=2, target_modules=["first"]))
    W, x = model.first.weight.detach().clone(), inputs["x"]
    model.add_adapter("lora", LoraConfig(r=1, init_lora_weights=False, target_modules=["first"]))
    lora = model.first.adapters["lora"]
    change = own["first.B"] @ F.relu(own["first.A"] @ W) + 8 * lora.B @ lora.A
    expected = F.linear(x, W + change, model.first.bias.detach())
    for order in (["default", "lora"], ["lora", "default"]):
        model.set_adapter(order)
        torch.testing.assert_close(model.first(x), expected, rtol=1e-5, atol=1e-5)
        model.merge_adapter()
        torch.testing.assert_close(F.linear(x, model.first.weight, model.first.bias), expected, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()


def test_peanut_becomes_a_lora_of_its_rank() -> None:
    model, inputs, _ = attached(PeanutConfig(r=2, depth=1, target_modules=["first", "second"]))
    expected = models.output(model, inputs)
    assert model.convert_to_lora(2) == pytest.approx({"first": 1.0, "second": 1.0})
    model.set_adapter("lora")
    torch.testing.assert_close(models.output(model, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"act_fn": "rellu"}, "act_fn='rellu': no function is known by that name. Did you mean 'relu'"),
     ({"depth": -1}, "depth=-1: Input should be greater than or equal to 0")],
)  # fmt: skip
def test_peanut_refuses_what_makes_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PeanutConfig(**settings)
