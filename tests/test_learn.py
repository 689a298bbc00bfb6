"""Every method learns a small task that its base has not learnt: a few dozen steps, far below the frozen loss."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trimtab
from trimtab import (
    BeftConfig,
    BitFitConfig,
    BOFTConfig,
    C3AConfig,
    DeloraConfig,
    FourierFTConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeanutConfig,
    PeftConfig,
    PolyConfig,
    PsoftConfig,
    PveraConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
)

# config, learning rate, and the share of the frozen model's loss that it must get below
CASES: dict[str, tuple[PeftConfig, float, float]] = {
    "bitfit": (BitFitConfig(), 0.05, 0.3),
    "ia3": (IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]), 0.05, 0.6),
    "ln_tuning": (LNTuningConfig(), 0.05, 0.3),
    "lora": (LoraConfig(r=4, target_modules=["0", "2"]), 0.02, 0.1),
    "dora": (LoraConfig(r=4, use_dora=True, target_modules=["0", "2"]), 0.02, 0.1),
    "pissa": (LoraConfig(r=4, init_lora_weights="pissa", target_modules=["0", "2"]), 0.02, 0.1),
    "vera": (VeraConfig(r=64, target_modules=["0", "2", "4"]), 0.02, 0.1),
    "loha": (LoHaConfig(r=4, target_modules=["0", "2"]), 0.02, 0.1),
    "lokr": (LoKrConfig(r=4, target_modules=["0", "2"]), 0.02, 0.3),
    "c3a": (C3AConfig(block_size=8, target_modules=["0", "2"]), 0.5, 0.1),
    "road": (RoadConfig(variant="road_2", group_size=8, target_modules=["0", "2"]), 0.05, 0.3),
    "hira": (HiraConfig(r=4, target_modules=["0", "2"]), 0.05, 0.3),
    "gralora": (GraloraConfig(r=4, alpha=8, target_modules=["0", "2"]), 0.02, 0.1),
    "glora": (GloraConfig(r=4, target_modules=["0", "2"]), 0.02, 0.1),
    "pvera": (PveraConfig(r=64, target_modules=["0", "2", "4"]), 0.02, 0.3),
    "beft": (BeftConfig(target_modules=["0", "2", "4"]), 0.05, 0.6),
    "lily": (LilyConfig(r=4, target_modules=["0", "2"]), 0.02, 0.1),
    "psoft": (PsoftConfig(r=16, target_modules=["0", "2"]), 0.02, 0.3),
    "peanut": (PeanutConfig(r=4, depth=1, target_modules=["0", "2"]), 0.02, 0.1),
    "oft": (OFTConfig(oft_block_size=8, target_modules=["0", "2"]), 0.02, 0.2),
    "boft": (BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["0", "2"]), 0.02, 0.1),
    "hra": (HRAConfig(r=4, target_modules=["0", "2"]), 0.02, 0.3),
    "miss": (MissConfig(r=4, target_modules=["0", "2"]), 0.02, 0.2),
    "miss-mini": (MissConfig(r=4, init_weights="mini", mini_r=12, target_modules=["2"]), 0.02, 0.5),
    "miss-bat": (MissConfig(r=8, init_weights="bat", target_modules=["0", "2"]), 0.02, 0.1),
    "delora": (DeloraConfig(r=4, delora_lambda=1, target_modules=["0", "2"]), 0.02, 0.2),
    "fourierft": (FourierFTConfig(n_frequency=300, target_modules=["0", "2"]), 0.05, 0.3),
    "poly": (PolyConfig(r=4, target_modules=["0", "2"]), 0.05, 0.3),
    "randlora": (RandLoraConfig(r=4, randlora_alpha=40, target_modules=["0", "2"]), 0.02, 0.1),
    "shira": (ShiraConfig(r=4, target_modules=["0", "2"]), 0.02, 0.2),
    "waveft": (WaveFTConfig(n_frequency=300, target_modules=["0", "2"]), 0.005, 0.3),
    "vblora": (VBLoRAConfig(r=4, num_vectors=64, vector_length=8, target_modules=["0", "2"]), 0.05, 0.3),
    "unilora": (UniLoraConfig(r=4, theta_d_length=300, target_modules=["0", "2"]), 0.1, 0.3),
    "tinylora": (TinyLoraConfig(r=16, u=200, target_modules=["0", "2"]), 0.02, 0.5),
}


def task() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A base, and labels that a neighbour of it gives: the same network, weights moved a little, vectors a lot."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 24), nn.LayerNorm(24), nn.Linear(24, 5))
    x = torch.randn(256, 16)
    neighbour = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 24), nn.LayerNorm(24), nn.Linear(24, 5))
    with torch.no_grad():
        for own, other in zip(neighbour.parameters(), base.parameters(), strict=True):
            own.copy_(other + (0.5 if other.dim() == 1 else 0.1) * torch.randn_like(other))
        return base, x, neighbour(x)


def test_trainable_tokens_learn_new_tokens() -> None:
    """A sum over embeddings; the labels use other vectors for two of the tokens."""
    torch.manual_seed(0)
    base, wanted = nn.Embedding(8, 4), nn.Embedding(8, 4)
    ids = torch.randint(0, 8, (64, 5))
    table = nn.Sequential(nn.Embedding.from_pretrained(base.weight.detach()))
    labels = base.weight.detach().clone()
    labels[[2, 7]] = wanted.weight.detach()[[2, 7]]
    model: Any = trimtab.get_peft_model(table, TrainableTokensConfig(token_indices=[7, 2]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.mse_loss(model(ids).sum(1), F.embedding(ids, labels).sum(1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.parametrize("name", CASES)
def test_every_method_learns(name: str) -> None:
    config, rate, share = CASES[name]
    base, x, y = task()
    model: Any = trimtab.get_peft_model(base, config)
    model.train()
    frozen = F.mse_loss(model(x), y).item()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert F.mse_loss(model.eval()(x), y).item() < share * frozen
