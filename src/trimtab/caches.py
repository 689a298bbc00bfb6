"""The key-value cache of a transformers model, with keys and values of virtual tokens put in."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def filled(model: nn.Module, cache: Any, states: Iterator[tuple[Tensor, Tensor]]) -> Any:
    """The cache (a new one for None) with the states of each layer in turn: keys and values (B, heads, P, width)."""
    if cache is None:
        cache = _new(model.config)
    own = getattr(cache, "self_attention_cache", cache)  # an encoder-decoder has one for cross-attention beside it
    for layer, (keys, values) in enumerate(states):
        own.update(keys, values, layer)
    return cache


def _new(config: Any) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    if getattr(config, "is_encoder_decoder", False):
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)
