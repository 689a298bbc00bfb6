"""Texts as tokens, and soft tokens as the real ones closest to them."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .attach import trunk
from .errors import AdapterError, ConfigError
from .prompts import Prompt, embedding


def read(text: str, tokenizer: str, settings: dict[str, Any]) -> list[int]:
    """The ids of a text.

    Raises:
        ConfigError: no such tokenizer, or a text without a token.
    """
    if "trust_remote_code" in settings:
        raise ConfigError("tokenizer_kwargs must not hold trust_remote_code: an adapter's file could run any code.")
    from transformers import AutoTokenizer

    try:
        ids = list(AutoTokenizer.from_pretrained(tokenizer, **settings)(text)["input_ids"])
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"tokenizer_name_or_path={tokenizer!r} gives no tokenizer: {reason}") from None
    if not ids:
        raise ConfigError(f"prompt_tuning_init_text={text!r} has no token.")
    return ids


def nearest_tokens(
    model: nn.Module, tokenizer: Any = None, k: int = 1, adapter_name: str | None = None
) -> list[list[Any]]:
    """For each virtual token the k tokens with the most similar embeddings, closest first.

    Similarity is the cosine, as in Lester et al. 2021 (section 7).

    Args:
        tokenizer: turns ids into tokens; without it ids are returned.
        adapter_name: the active prompt by default.
    Raises:
        AdapterError: no adapter of that name, or none with virtual tokens at the embedding.
    """
    own = trunk(model)
    names = own.active.names if adapter_name is None else (adapter_name,)
    adapters = [(own.sites[path], adapter) for name in names for path, adapter in own.adapters(name).items()]
    found = [(site, part) for site, adapter in adapters for part in adapter.parts() if isinstance(part, Prompt)]
    if not found:
        raise AdapterError(f"{', '.join(names) or 'No active adapter'}: no virtual tokens at the embedding.")
    [(site, prompt)] = found
    with torch.no_grad():
        table = F.normalize(embedding(site).weight.float(), dim=-1)  # (V, D)
        virtual = F.normalize(prompt()[: prompt.tokens].float(), dim=-1)  # (P, D)
        ids: list[list[int]] = (virtual @ table.T).topk(k).indices.tolist()
    return ids if tokenizer is None else [tokenizer.convert_ids_to_tokens(row) for row in ids]
