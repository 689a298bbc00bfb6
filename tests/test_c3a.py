"""C3A against its formula, with every circulant block written out."""

import models
import pytest
import torch
from test_formulas import attached, trained
from torch import Tensor, nn

from trimtab import C3AConfig, ConfigError, get_peft_model


def circulant(kernel: Tensor) -> Tensor:
    """(out / c, in / c, c) -> (out, in): each row of a block is the one above it, moved on by one."""
    m, n, c = kernel.shape
    D = torch.zeros(m * c, n * c)
    for i in range(m):
        for j in range(n):
            for k in range(c):
                D[i * c + k, j * c : (j + 1) * c] = kernel[i, j].roll(k)
    return D / (n * c)


@pytest.mark.parametrize("block", [1, 2, 3, 6])
def test_c3a_adds_circulant_blocks(block: int) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 18))
    model, _, own = attached(C3AConfig(block_size=block, target_modules=["0"]), models.Tiny(base, {}))
    W, b = base[0].weight.detach().clone(), base[0].bias.detach()
    x = torch.randn(2, 3, 12)
    expected = x @ (W + circulant(own["0.kernel"])).T + b
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert trained(model) == 12 * 18 // block


@pytest.mark.parametrize(
    ("kind", "spread"),
    [(True, 0.0), ("gaussian", 1.0), ("kaiming_uniform", (1 / 40 / 3) ** 0.5), ("xavier_uniform", (2 / 100) ** 0.5),
     (False, (2 / 100) ** 0.5)],
)  # fmt: skip
def test_the_starts_have_the_deviation_that_their_names_say(kind: bool | str, spread: float) -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(40, 60)), C3AConfig(block_size=2, init_weights=kind,
                                                                       target_modules=["0"]))  # fmt: skip
    assert model[0].adapters["default"].kernel.std().item() == pytest.approx(spread, rel=0.1)


def test_c3a_refuses_a_block_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"key has 16 inputs and 16 outputs: block_size=6 does not .* Closest: 4"):
        get_peft_model(models.bert().model, C3AConfig(block_size=6, target_modules=["key"]))
    with pytest.raises(ConfigError, match=r"block_size_pattern has the key 'kex'.*'.*key'"):
        get_peft_model(models.bert().model, C3AConfig(block_size=4, block_size_pattern={"kex": 2},
                                                      target_modules=["key"]))  # fmt: skip


@pytest.mark.parametrize("bias", ["none", "c3a_only"])
def test_adapters_of_c3a_add_up_in_their_own_values(bias: str) -> None:
    """Their sum has circulant blocks again, so nothing is lost and no LoRA is needed."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 18))
    W, b = base[0].weight.detach().clone(), base[0].bias.detach().clone()
    config = C3AConfig(block_size=6, bias=bias, target_modules=["0"])
    model, _, own = attached(config, models.Tiny(base, {}))
    model.add_adapter("other", config)
    other = model[0].adapters["other"]
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "both")
    model.set_adapter("both")
    assert type(model.peft_config["both"]) is C3AConfig
    x = torch.randn(4, 12)
    D = 0.5 * circulant(own["0.kernel"]) - 2 * circulant(other.kernel.detach())
    shift = 0.5 * (own["0.bias.value"] - b) if bias != "none" else 0.0
    torch.testing.assert_close(model(x), x @ (W + D).T + b + shift, rtol=1e-5, atol=1e-5)
