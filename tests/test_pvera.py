"""PVeRA against its formula: the mean in evaluation, draws around it in training."""

from typing import Any

import models
import pytest
import torch
from test_formulas import agrees, attached, trained
from torch import Tensor

from trimtab import ConfigError, PveraConfig, TargetError, get_peft_model


def parts(model: Any, own: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviation of z at `first`, each (4, r), and l_b B."""
    shared = model.first.adapters["default"].shared
    assert (shared.A.shape, shared.B.shape) == ((2 * 6, 7), (7, 6))  # wide enough for both sites
    h = x @ shared.A[:, :5].T * own["first.lambda_d"]
    return h[:, :6], torch.exp(h[:, 6:] / 2), own["first.lambda_b"][:, None] * shared.B


def test_pvera_evaluates_and_merges_the_mean() -> None:
    model, inputs, own = attached(PveraConfig(r=6, target_modules=["first", "second"]))
    x = inputs["x"]
    mean, _, B = parts(model, own, x)
    assert trained(model) == (7 + 12) + (6 + 12)
    agrees(model, x, x @ model.first.weight.T + model.first.bias + mean @ B.T)


@pytest.mark.parametrize("settings", [{}, {"sample_at_inference": True}])
def test_pvera_draws_around_the_mean(settings: dict[str, Any]) -> None:
    model, inputs, own = attached(PveraConfig(r=6, target_modules=["first", "second"], **settings))
    model.train(not settings)
    x = inputs["x"][:1]
    mean, deviation, B = parts(model, own, x)
    torch.manual_seed(0)
    base = x @ model.first.weight.T + model.first.bias
    drawn = model.first(x.expand(100_000, -1)).detach() - base.detach()
    expected = mean @ B.T
    spread = (B * deviation) @ (B * deviation).T  # the covariance
    torch.testing.assert_close(drawn.mean(0), expected[0], rtol=0.05, atol=0.02 * spread.diag().max().sqrt().item())
    torch.testing.assert_close(drawn.T.cov(), spread, rtol=0.05, atol=0.02 * spread.max().item())


def test_pvera_is_refused_where_only_the_weight_is_read() -> None:
    """There what is drawn would be left out without a word."""
    with pytest.raises(TargetError, match=r"linear1 is never called: .*, and PveraAdapter draws anew"):
        get_peft_model(models.encoder().model, PveraConfig(r=4, target_modules=["linear1"]))


def test_pvera_offers_no_generator_apart() -> None:
    PveraConfig(generator_seed=None)
    with pytest.raises(ConfigError, match="generator_seed is a setting of HF PEFT's PveraConfig that"):
        PveraConfig(generator_seed=3)
