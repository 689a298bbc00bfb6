"""GLoRA against its formula, each of the five in each of its forms."""

from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file
from test_formulas import agrees, attached, trained
from torch import Tensor

from trimtab import GloraConfig

FORMS = [
    ("lora", "lora", "constant", 2 * 2 * (5 + 7) + 2 * (5 + 1) + 2),
    ("vector", "vector", "vector", 2 * 7 + 5 + 2 * 7),
    ("constant", "none", "none", 2),
    ("none", "lora", "vector", 2 * (5 + 1) + 2 * 7),
]


def full(own: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """The matrix or vector that a form stands for."""
    start = f"first.forms.{name}."
    if start + "Xd" in own:
        return own[start + "Xd"] @ own[start + "Xu"]
    return own.get(start + "X", torch.zeros(1)).expand(shape)


@pytest.mark.parametrize(("of_weight", "of_both", "of_bias", "numbers"), FORMS)
def test_glora_changes_weight_and_bias(of_weight: Any, of_both: Any, of_bias: Any, numbers: int) -> None:
    config = GloraConfig(r=2, config_A_B=of_weight, config_C=of_both, config_D_E=of_bias, target_modules=["first"])
    model, inputs, own = attached(config)
    W, b = model.first.weight.detach().clone(), model.first.bias.detach().clone()
    A, B, C = full(own, "A", (7, 5)), full(own, "B", (7, 5)), full(own, "C", (5, 1))
    D, E = full(own, "D", (7,)), full(own, "E", (7,))
    assert trained(model) == numbers
    agrees(model, inputs["x"], inputs["x"] @ (W + W * A + B).T + b + b * D + E + (W @ C)[:, 0])


def test_glora_s_file_holds_hf_peft_s_zeros_and_the_model_does_not(tmp_path: Any) -> None:
    model, _, own = attached(GloraConfig(r=2, target_modules=["q_proj"]), models.llama())  # no biases
    assert {name.rsplit(".", 1)[-1] for name in own} == {"Xd", "Xu"}
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    start = "base_model.model.model.layers.0.self_attn.q_proj.glora_"
    assert {key.removeprefix(start): tuple(value.shape) for key, value in saved.items() if key.startswith(start)} == {
        "A.Xd": (16, 2), "A.Xu": (2, 16), "B.Xd": (16, 2), "B.Xu": (2, 16),
        "C.zeros": (16, 1), "D.zeros": (16,), "E.zeros": (16,),
    }  # fmt: skip
    assert not any(saved[key].any() for key in saved if key.endswith("zeros"))
