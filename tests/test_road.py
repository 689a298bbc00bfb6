"""RoAd against its formula, pair by pair."""

from math import cos, sin

import models
import pytest
import torch
from test_formulas import attached, trained
from torch import Tensor, nn

from trimtab import ConfigError, RoadConfig, get_peft_model

OUT, GROUP = 12, 6


def matrix(theta: Tensor, alpha: Tensor, variant: str) -> Tensor:
    """R (out, out). Of group k, features 6 k + i and 6 k + 3 + i are a pair, i < 3."""
    R = torch.zeros(OUT, OUT)
    for k in range(OUT // GROUP):
        for i in range(GROUP // 2):
            u, v = GROUP * k + i, GROUP * k + GROUP // 2 + i
            for row in (u, v):
                own, other = (GROUP // 2 * k + i,) * 2 if variant == "road_1" else (row, row)
                if variant == "road_4":
                    own, other = row + GROUP * k, row + GROUP * k + GROUP
                R[row, row] = alpha[own] * cos(theta[own])
                R[row, u + v - row] = alpha[other] * sin(theta[other]) * (-1 if row == u else 1)
    return R


@pytest.mark.parametrize(("variant", "numbers"), [("road_1", 12), ("road_2", 24), ("road_4", 48)])
def test_road_turns_pairs_of_outputs_and_the_bias_with_them(variant: str, numbers: int) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, OUT))
    W, b = base[0].weight.detach().clone(), base[0].bias.detach().clone()
    config = RoadConfig(variant=variant, group_size=GROUP, target_modules=["0"])
    model, _, own = attached(config, models.Tiny(base, {}))
    x = torch.randn(2, 3, 5)
    expected = (x @ W.T + b) @ matrix(own["0.theta"], own["0.alpha"], variant).T
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert trained(model) == numbers


def test_road_of_one_angle_is_a_rotation() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(5, 4)), RoadConfig(group_size=4, target_modules=["0"]))
    x = torch.randn(3, 5)
    before = model(x)
    with torch.no_grad():
        model[0].adapters["default"].theta.normal_()
    torch.testing.assert_close(model(x).norm(dim=1), before.norm(dim=1))
    assert (model(x) - before).norm() > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 5}, "group_size=5: .* its size is even. Closest: 4"),
        ({"group_size": 8, "target_modules": ["second"]}, "6 outputs, which group_size=8 does not .* Closest: 6"),
        ({"group_size": 4, "target_modules": ["second"]}, "6 outputs, which group_size=4 does not .* Closest: 2"),
        ({"group_size": 2, "target_modules": ["first"]}, "first has 7 outputs, which are not pairs"),
    ],
)
def test_road_refuses_groups_that_do_not_fit(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(models.mlp().model, RoadConfig(**settings))
