"""The key-value cache of a transformers model, with keys and values of virtual tokens in it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TargetError
from .targets import base_modules, takes

Pair = tuple[Tensor, Tensor]  # keys and values of one layer, each (B, heads, P, width of a head)


class FixedCache:
    """Keys and values before those of one call, which leaves them as they are; looks like a layer's cache to it."""

    def __init__(self, states: Pair) -> None:
        self.states = states

    def update(self, keys: Tensor, values: Tensor, *ignored: Any, **settings: Any) -> Pair:
        before = [state.to(keys.dtype) for state in self.states]
        return torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)

    def get_seq_length(self, *ignored: Any) -> int:
        return self.states[0].shape[2]


def filled(model: nn.Module, cache: Any, states: Iterable[Pair]) -> Any:
    """The cache (a new one for None) with the states of each layer in turn."""
    if cache is None:
        cache = _new(model.config)
    own = getattr(cache, "self_attention_cache", cache)  # an encoder-decoder has one for cross-attention beside it
    for layer, (keys, values) in enumerate(states):
        own.update(keys, values, layer)
        own.virtual = keys.shape[2]
    return cache


def scale(cache: Any, layer: int, length: int, by: Tensor) -> None:
    """Multiply the last so many keys and values of a layer, while it has no others than virtual tokens'.

    Of a cache as one group of a batch sees it (row_inputs.py), those of the group's rows.
    """
    real, rows = getattr(cache, "real", cache), getattr(cache, "rows", slice(None))
    whole = getattr(real, "self_attention_cache", real)
    own = whole.layers[layer]
    virtual = getattr(whole, "virtual", None)  # none where others have filled it
    if own.get_seq_length() == virtual:
        factors = by.new_ones(len(own.keys), 1, virtual, 1)
        factors[rows, :, virtual - length :] = by
        own.keys, own.values = own.keys * factors, own.values * factors


def _new(config: Any) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    if getattr(config, "is_encoder_decoder", False):
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)


def holder(model: nn.Module) -> tuple[str, nn.Module]:
    """The module that takes a cache, with its name: the root, or the base model below a head.

    Raises:
        TargetError: there is none.
    """
    for module in (model, getattr(model, "base_model", model)):
        if takes(module, "past_key_values"):
            return next(((name, found) for name, found in base_modules(model) if found is module), ("", model))
    raise TargetError(
        f"{type(model).__name__} takes no past_key_values, through which a prefix enters attention. Use a method at "
        "layers, such as LoraConfig."
    )


def readers(model: nn.Module) -> dict[str, int]:
    """The attention modules that read the cache, by name, with the number of their layer in it.

    Those of a vision or audio tower, or of an encoder, may look as if they did.
    """
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    inside = {id(module) for module in decoder.modules()}
    found: dict[str, int] = {}
    for name, module in base_modules(model):
        layer = getattr(module, "layer_idx", None)
        if id(module) in inside and isinstance(layer, int) and takes(module, "past_key_values"):
            found[name] = layer
    return {name: layer for name, layer in found.items() if not any(other.startswith(f"{name}.") for other in found)}


def sizes(model: nn.Module) -> tuple[int, int, int]:
    """Numbers of layers and of heads of keys and values in each, and the width of a head."""
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    if getattr(config, "is_heterogeneous", False) or getattr(config, "global_head_dim", None):
        raise TargetError(f"{type(model).__name__} has layers with heads of different sizes, which no one prefix fits.")
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    return layers, getattr(config, "num_key_value_heads", None) or heads, width
