"""GraLoRA against its formula, block by block."""

from typing import Any

import models
import pytest
import torch
from test_formulas import attached, trained
from torch import Tensor, nn

from trimtab import ConfigError, GraloraConfig

OUT, IN = 18, 12


def delta(own: dict[str, Tensor], k: int, r: int) -> Tensor:
    """D without the scale: block (j, n) from part j of A_n and part n of B_j."""
    D, s, o, i = torch.zeros(OUT, IN), r // k, OUT // k, IN // k
    for j in range(k):
        for n in range(k):
            a, b = own["0.A"][n][:, j * s : (j + 1) * s], own["0.B"][j][n * s : (n + 1) * s]
            D[j * o : (j + 1) * o, n * i : (n + 1) * i] = (a @ b).T
    return D


@pytest.mark.parametrize(("k", "r", "hybrid"), [(1, 2, 0), (2, 4, 0), (3, 3, 2), (6, 6, 1)])
def test_gralora_has_a_product_for_each_block(k: int, r: int, hybrid: int) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(IN, OUT))
    W, b = base[0].weight.detach().clone(), base[0].bias.detach()
    config = GraloraConfig(r=r, gralora_k=k, hybrid_r=hybrid, alpha=5, target_modules=["0"])
    model, _, own = attached(config, models.Tiny(base, {}))
    numbers = trained(model)
    D = delta(own, k, r)
    assert torch.linalg.matrix_rank(D) == min(k * r, IN)
    if hybrid:
        D = D + own["0.general_B"] @ own["0.general_A"]
    x = torch.randn(2, 3, IN)
    expected = x @ (W + 5 / (r + hybrid) * D).T + b
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model.convert_to_lora(min(k * r + hybrid, IN), lora_name="lora")
    model.set_adapter("lora")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert numbers == (r + hybrid) * (IN + OUT)  # LoRA's


def test_gralora_refuses_a_rank_that_is_not_shared_out() -> None:
    settings: dict[str, Any]
    for settings, message in (({"r": 5}, "gralora_k=2 does not divide r=5. Closest: r=4"),
                              ({"r": 1, "gralora_k": 4}, "Closest: r=4")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            GraloraConfig(**settings)
