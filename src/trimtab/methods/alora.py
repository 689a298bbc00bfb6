"""Activated LoRA, aLoRA (Greenewald et al. 2025, arXiv 2504.12397): y_t = W x_t + s B A x_t from the invocation on.

The invocation is a sequence of tokens, and its last occurrence in a row counts. What is before it, and a row
without it, is left to the base: y_t = W x_t.
Keys and values before it are the base's own, so a cache that the base has filled (`with model.disable_adapter()`) can
be gone on from, by several such adapters in turn. The paper reports accuracy close to LoRA's, and answers much sooner
where one conversation goes to several adapters. For an adapter that acts on whole texts LoRA is simpler, and can be
merged; this cannot.

A call looks for the invocation in its own tokens. What follows it in later calls with the same cache is adapted too:
the cache remembers which rows were invoked. (HF PEFT does so inside `generate` only, and without a KV cache it adapts
as many last tokens in every step as there were in the first; here those from the invocation on.) Where the model itself
writes the invocation, the tokens of an earlier one are the base's again if there is no cache.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import InputAdapter
from ..errors import AdapterError, ConfigError, MergeError, TargetError
from ..sites import is_read
from ..targets import is_linear, takes

PLAIN = {"bias": ("none",), "use_dora": (False,), "init_lora_weights": (True, False, "gaussian", "orthogonal")}


class Invocation(InputAdapter):
    """At the root of the model: from which token on each row is adapted. Trains nothing; one for all sites."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.tokens = tuple(tokens)
        self.offsets: Tensor | None = (
            None  # (B,) how many of the last tokens; kept for recomputing in the backward pass
        )

    def inputs(self, site: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        ids = given.get("input_ids")
        if ids is None or ids.dim() != 2:
            raise AdapterError(
                "aLoRA looks for its invocation in input_ids (batch, length): inputs_embeds do not tell."
            )
        self.offsets = self._last(ids)
        past = given.get("past_key_values")
        if past is not None and past.get_seq_length():
            before = getattr(past, "invoked", {}).get(self.tokens, torch.zeros_like(self.offsets, dtype=torch.bool))
            if len(before) != len(ids):
                raise AdapterError(f"The cache was filled with {len(before)} rows; these are {len(ids)}.")
            begun = before.to(ids.device) & (self.offsets == 0)
            self.offsets = self.offsets.masked_fill(begun, ids.shape[1])
        return given

    def outputs(self, site: nn.Module, given: dict[str, Any], result: Any) -> Any:
        assert self.offsets is not None
        parts: Iterable[Any] = result.values() if isinstance(result, Mapping) else result
        for cache in (part for part in parts if hasattr(part, "get_seq_length")):
            cache.invoked = {**getattr(cache, "invoked", {}), self.tokens: self.offsets > 0}
        if not torch.is_grad_enabled():
            self.offsets = None  # not to be taken for those of another call
        return result

    def select(self, base: Tensor, adapted: Tensor) -> Tensor:
        """What is adapted from the invocation on, else what is the base's; both (B, T, n)."""
        if self.offsets is None:
            raise AdapterError("aLoRA acts in calls of the whole model, which tell where its invocation is.")
        if base.dim() != 3 or len(base) != len(self.offsets):
            raise AdapterError(f"aLoRA needs values of shape (batch, length, width) at its layers; here is one with "
                               f"{tuple(base.shape)}. Leave it out with exclude_modules.")  # fmt: skip
        length = base.shape[1]
        place = torch.arange(length, device=base.device)
        invoked = place >= length - self.offsets.to(base.device)[:, None]  # (B, T)
        return torch.where(invoked[..., None], adapted, base)

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        raise MergeError("aLoRA acts on the tokens from its invocation on, and a weight acts on all. Keep the adapter "
                         "attached instead.")  # fmt: skip

    def _last(self, ids: Tensor) -> Tensor:
        """How many tokens there are from the last occurrence on, 0 where there is none: (B,)."""
        length, wanted = ids.shape[1], torch.tensor(self.tokens, device=ids.device)
        if length < len(wanted):
            return ids.new_zeros(len(ids))
        here = (ids.unfold(1, len(wanted), 1) == wanted).all(-1)  # (B, starts)
        left = length - torch.arange(here.shape[1], device=ids.device)
        return torch.where(here.any(1), torch.where(here, left, length).amin(1), 0)


def invocation(model: nn.Module, tokens: list[int], targets: Iterable[str], config: Any) -> Invocation:
    """A new one for these targets. Raises: TargetError, ConfigError: a model, layer or setting it does not go with."""
    for setting, allowed in PLAIN.items():
        if (value := getattr(config, setting)) not in allowed:
            raise ConfigError(f"{setting}={value!r} cannot go with alora_invocation_tokens, before which the base acts "
                              f"as it is, in HF PEFT too. Closest: {allowed[0]!r}.")  # fmt: skip
    if takes(model, "decoder_input_ids") or not takes(model, "input_ids"):
        raise TargetError(f"aLoRA is for models with one sequence of input_ids; {type(model).__name__} is none.")
    modules = dict(model.named_modules())
    for name in targets:
        if not is_linear(modules[name]) or is_read(modules[name], modules[name.rpartition(".")[0]]):
            raise TargetError(f"{name} is no linear layer that is called with tokens, and aLoRA acts on those only. "
                              "Leave it out with exclude_modules.")  # fmt: skip
    return Invocation(tokens)
