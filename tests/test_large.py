"""A model of Llama 70B's shape, without values: attaching and loading touch the adapter's bytes, and no others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab import LoraConfig, PeftModel, get_peft_model

# Inputs and outputs of the seven linear layers: q, k, v, o, gate, up, down.
SHAPES = [(8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192), (8192, 28672), (8192, 28672), (28672, 8192)]


class Allocations(TorchDispatchMode):
    """The bytes of every storage that PyTorch makes, by device; each is kept, so that no address is seen twice."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[Any, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {value.untyped_storage()._cdata for value in args if isinstance(value, Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and (storage := result.untyped_storage())._cdata not in known:
            self.made[storage._cdata] = storage, result.device.type
        return result

    def bytes(self, device: str) -> list[int]:
        return [storage.nbytes() for storage, place in self.made.values() if place == device]


def llama(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=layers, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def config(r: int) -> LoraConfig:
    return LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")


def test_attaching() -> None:
    model = llama(80)
    with Allocations() as seen:
        get_peft_model(model, config(16))
    parameters, _ = model.get_nb_trainable_parameters()
    assert parameters == 80 * 16 * sum(a + b for a, b in SHAPES)
    assert not seen.bytes("cpu")
    assert sum(seen.bytes("meta")) == 4 * parameters


def test_loading(tmp_path: Path) -> None:
    """From the file to where the values stay, without another copy."""
    made = get_peft_model(llama(2), config(4))
    names = [f"base_model.model.{name}" for name, _ in made.named_parameters() if ".adapters." in name]
    tensors = {
        name.replace(".adapters.default.A", ".lora_A.weight").replace(".adapters.default.B", ".lora_B.weight"): value
        for name, value in zip(names, map(torch.randn, shapes(made)), strict=True)
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config(4).save_pretrained(tmp_path)
    size = sum(value.nbytes for value in tensors.values())
    base = llama(2)
    with Allocations() as seen:
        loaded = PeftModel.from_pretrained(base, tmp_path)
    own = {name: value for name, value in loaded.named_parameters() if ".adapters." in name}
    assert sum(value.nbytes for value in own.values()) == size
    assert all(value.device.type == "cpu" for value in own.values())
    assert sum(seen.bytes("cpu")) == sum(seen.bytes("meta")) == size  # the values, and the plan that they fill


def shapes(model: Any) -> Iterator[torch.Size]:
    return (value.shape for name, value in model.named_parameters() if ".adapters." in name)
