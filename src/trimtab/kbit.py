"""Make a model whose weights are quantized ready for training adapters on it."""

from typing import Any

import torch
from torch import nn


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Freeze the base, compute its unquantized half-precision parts in float32, and checkpoint activations.

    Norms and heads in half precision lose the small steps that training is made of. Gradient checkpointing defaults
    to `use_reentrant=False`, the variant that needs no gradient at the model's input.
    """
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.to(torch.float32)
    if use_gradient_checkpointing:
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        enable: Any = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5
        (enable or model.gradient_checkpointing_enable)(settings)  # type: ignore[operator]
    return model


prepare_model_for_int8_training = prepare_model_for_kbit_training  # the name of HF PEFT before 0.10
