"""Adaptive ranks, bottlenecks and interventions learn a small task that their base has not learnt."""

from typing import Any

import pytest
import torch
from test_learn import task
from torch.nn import functional as F

from trimtab import AdaLoraConfig, BottleneckConfig, CompacterConfig, PeftConfig, get_peft_model

STEPS = 150

# config, learning rate, and the share of the frozen model's loss that it must get below
CASES: dict[str, tuple[PeftConfig, float, float]] = {
    "adalora": (
        AdaLoraConfig(init_r=6, target_r=3, total_step=STEPS, tinit=30, tfinal=50, target_modules=["0", "2"]),
        0.03,
        0.15,
    ),
    "compacter": (CompacterConfig(reduction_factor=1, phm_rank=4, target_modules=["0", "2"]), 0.02, 0.2),
    "bottleneck": (BottleneckConfig(reduction_factor=2, non_linearity="gelu", target_modules=["0", "2"]), 0.02, 0.2),
}


@pytest.mark.parametrize("name", CASES)
def test_every_method_learns(name: str) -> None:
    config, rate, share = CASES[name]
    base, x, y = task()
    model: Any = get_peft_model(base, config)
    model.train()
    frozen = F.mse_loss(model(x), y).item()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(STEPS):
        optimizer.zero_grad()
        penalty = model.penalty()
        loss = F.mse_loss(model(x), y)
        (loss if penalty is None else loss + 0.01 * penalty).backward()
        optimizer.step()
    with torch.no_grad():
        learnt = F.mse_loss(model.eval()(x), y).item()
    assert learnt < share * frozen, (learnt, frozen)
