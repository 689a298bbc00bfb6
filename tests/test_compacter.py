"""Compacter against its formula, with numpy's Kronecker product."""

from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from battery import close, run
from models import randomise
from safetensors.torch import load_file

from trimtab import CompacterConfig, ConfigError, PeftModel, get_peft_model


def adapted(model: Any, **settings: Any) -> Any:
    get_peft_model(model, CompacterConfig(**settings))
    randomise(model)
    return model


def test_the_formula() -> None:
    model = models.llama().model
    h = torch.randn(3, 24)
    layer = model.model.layers[0].mlp.down_proj
    y = layer(h).detach()
    adapted(model, reduction_factor=2, phm_rank=2, non_linearity="tanh")
    own = layer.adapters["default"]
    A, ds, dt, us, ut = (v.detach().numpy() for v in (own.rule.A, own.down_s, own.down_t, own.up_s, own.up_t))
    D = sum(np.kron(A[i], ds[i] @ dt[i]) for i in range(4))
    U = sum(np.kron(A[i], us[i] @ ut[i]) for i in range(4))
    assert (D.shape, U.shape) == ((8, 16), (16, 8))
    inner = np.tanh(y.numpy() @ D.T + own.down_bias.detach().numpy())
    close(layer(h), y + torch.tensor(inner @ U.T) + own.up_bias)
    # m^3 once; at each of 4 sites phm_rank (r + n) for each of D and U, and the biases
    assert model.get_nb_trainable_parameters()[0] == 4**3 + 4 * (2 * 2 * (8 + 16) + 8 + 16)


def test_plus_plus_leaves_attention_alone() -> None:
    model = adapted(models.bert().model, reduction_factor=2, plus_plus=True)
    assert [status.name for status in model.get_layer_status()] == [
        f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)
    ]


def test_the_shared_rule_is_saved_once_and_shared_again(tmp_path: Path) -> None:
    model, inputs = models.bert()
    expected = run(adapted(model, reduction_factor=2), inputs)
    model.save_pretrained(tmp_path)
    keys = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert [key for key in keys if not key.startswith("base_model.model.")] == ["base_model.compacter_A"]
    assert len(keys) == 1 + 4 * 6
    loaded = PeftModel.from_pretrained(models.bert().model, tmp_path, is_trainable=True)
    close(run(loaded, inputs), expected)
    assert sum(name.endswith("rule.A") for name, p in loaded.named_parameters() if p.requires_grad) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"phm_dim": 3}, "16 wide, which phm_dim=3 does not divide. Closest: 2"),
     ({"reduction_factor": 8}, "leaves fewer than the phm_dim=4 features that one block needs. Closest: 4")],
)  # fmt: skip
def test_nonsense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        adapted(models.llama().model, **settings)
