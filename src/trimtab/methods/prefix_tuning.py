"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190): attention(Q, [P_k; K], [P_v; V]) in every layer, P learned.

P is (tokens, layers * 2 * heads * width of a head), the heads being those of keys and values, of which there are
fewer than queries under grouped-query attention. With a projection, P = W2 tanh(W1 H + b1) + b2 with H, W, b learned
(the paper's reparameterisation); after training only P matters.

The prefix enters through the key-value cache, so positions of the real tokens begin behind it.
"""

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import caches, weights
from ..adapter import Adapter, InputAdapter
from ..errors import AdapterError, ConfigError
from ..prompts import PromptLearningConfig, VirtualTokens, cached, named, setting, unnamed
from ..targets import takes


class Prefix(VirtualTokens):
    fills_cache: ClassVar[bool] = True
    enters_attention = False  # whether a `PrefixAgain` is in every layer

    def __init__(
        self, embedding: nn.Parameter, encoder: nn.Module | None, sizes: tuple[int, int, int], step: int
    ) -> None:
        """sizes: tokens, layers, heads of keys and values. step: HF PEFT's num_transformer_submodules."""
        super().__init__(embedding, sizes[0], encoder)
        self.layers, self.heads, self.step = *sizes[1:], step
        self._last: tuple[nn.Module, ...] = ()  # that of the last call; in a tuple, or it would be a part of this
        self._checkpoints: bool | None = None  # whether that checkpoints layers, where somebody has asked
        self.gates: nn.ModuleList | None = None  # of each layer: how far the prefix is let in

    def hf_key(self, name: str) -> str:
        return name if name.startswith("gates.") else super().hf_key(name)

    def inputs(self, site: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        self._last, self._checkpoints = (site,), None
        if not self.enters_attention and self.checkpoints:
            raise AdapterError(
                f"A prefix goes through the key-value cache, which {type(site).__name__} drops in checkpointed layers. "
                "Train without gradient checkpointing, or with PromptTuningConfig."
            )
        new = self.behind(given, self.axis)
        if not cached(given):
            names = [f"{where}{name}" for where in (self.axis, "") for name in ("input_ids", "inputs_embeds")]
            rows = next(len(given[name]) for name in (*names, "labels") if given.get(name) is not None)
            states = self.states(rows, weights.compute_dtype(site))
            new["past_key_values"] = caches.filled(site, given.get("past_key_values"), states)
        return named(site, new)

    def outputs(self, site: nn.Module, given: dict[str, Any], result: Any) -> Any:
        if given.get("past_key_values") is None and not setting(site, given, "use_cache"):
            # or generate would go on from a cache it did not ask for
            result = type(result)(**{name: value for name, value in result.items() if name != "past_key_values"})
        return unnamed(site, given, result)

    def fill(self, site: nn.Module, cache: Any, states: list[caches.Pair]) -> Any:
        return caches.filled(site, cache, states)

    @property
    def checkpoints(self) -> bool:
        """Whether the last call is one with checkpointed layers; not looked for before that matters."""
        if self._checkpoints is None:
            parts = (part for site in self._last if site.training for part in site.modules())
            self._checkpoints = any(vars(part).get("gradient_checkpointing") for part in parts)
        return self._checkpoints

    def states(self, rows: int, dtype: torch.dtype) -> list[caches.Pair]:
        """Keys and values in each layer, the same for each row."""
        found = self._pairs().to(dtype).unbind()
        return [_of_rows(found[self._number(layer)], rows) for layer in range(self.layers)]

    def state(self, layer: int, rows: int, dtype: torch.dtype) -> caches.Pair:
        """Those of one layer."""
        return _of_rows(self._pairs()[self._number(layer)].to(dtype), rows)

    def _pairs(self) -> Tensor:
        """(layers, 2, heads, P, width of a head)."""
        values: Tensor = self()
        return values.view(self.tokens, self.layers, 2, self.heads, -1).permute(1, 2, 3, 0, 4)

    def _number(self, layer: int) -> int:
        """With a step of 2 (encoder-decoders) HF PEFT skips every other pair; so must who reads its adapters."""
        return self.step * layer % self.layers


def _of_rows(pair: Tensor, rows: int) -> caches.Pair:
    keys, values = pair.unsqueeze(1).expand(-1, rows, -1, -1, -1)
    return keys, values


class PrefixAgain(InputAdapter):
    """At attention: the prefix, in case transformers has dropped the cache, as it does in checkpointed layers."""

    def __init__(self, prefix: Prefix, layer: int) -> None:
        super().__init__()
        self.prefix, self.layer = (prefix,), layer  # in a tuple, or its weights would be here too

    @property
    def takes_means(self) -> bool:  # type: ignore[override]
        return self.prefix[0].gates is not None

    def inputs(self, site: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        crosses = any(given.get(name) is not None for name in ("key_value_states", "encoder_hidden_states"))
        prefix, cache, hidden = self.prefix[0], given.get("past_key_values"), given["hidden_states"]
        dropped = cache is None and prefix.checkpoints
        if crosses or not (dropped or (cache is not None and prefix.gates is not None)):
            return given
        gate = hidden.new_ones(1) if prefix.gates is None else prefix.gates[self.layer](hidden).unsqueeze(1)
        if dropped:
            keys, values = prefix.state(self.layer, len(hidden), hidden.dtype)
            return {**given, "past_key_values": caches.FixedCache((keys * gate, values * gate))}
        caches.scale(cache, self.layer, prefix.tokens, gate)
        return given


class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning's settings, beside those of all virtual tokens.

    prefix_projection: make the prefix by a two-layer MLP of width encoder_hidden_size (by default token_dim) while
    training. init_weights: None (normal numbers, or what the MLP makes of them) or "zero". token_dim and
    num_attention_heads are those of keys: all heads together, and their number.
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    trains: ClassVar[str] = "keys and values of virtual tokens"
    relative_rate: ClassVar[float] = 20.0
    when: ClassVar[str] = "Generation with little data, from one frozen model for many tasks."
    evidence: ClassVar[str] = (
        "It acts in every layer, so more strongly than a prompt: Li and Liang match full fine-tuning of GPT-2 on "
        "table-to-text with 0.1 % of its parameters, and do better with little data. He et al. (2022) find it behind "
        "LoRA and parallel adapters as the budget grows. It takes room in the context and in the cache."
    )

    encoder_hidden_size: int | None = Field(default=None, ge=1)
    prefix_projection: bool = False
    init_weights: Literal["zero"] | None = None

    def resolved(self, model: nn.Module) -> Self:
        config = super().resolved(model)
        caches.holder(model)
        layers, heads, width = caches.sizes(model)
        for name, found in {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * width}.items():
            if getattr(self, name) not in (None, found):
                raise ConfigError(f"{name}={getattr(self, name)}, but in {type(model).__name__} it is {found}.")
            config = config.model_copy(update={name: found})
        return config.model_copy(update={"encoder_hidden_size": self.encoder_hidden_size or heads * width})

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        assert self.num_virtual_tokens is not None
        assert self.num_transformer_submodules is not None
        path, module = caches.holder(model)
        layers, heads, width = caches.sizes(model)
        out, encoder = layers * 2 * heads * width, None
        columns = heads * width if self.prefix_projection else out
        values = weights.new_parameter(module, self.num_virtual_tokens, columns)
        nn.init.normal_(values)
        if self.prefix_projection:
            assert self.encoder_hidden_size is not None
            last = nn.Linear(self.encoder_hidden_size, out)
            encoder = nn.Sequential(nn.Linear(heads * width, self.encoder_hidden_size), nn.Tanh(), last)
        if self.init_weights == "zero":
            for parameter in (values,) if encoder is None else last.parameters():
                nn.init.zeros_(parameter)
        sizes = self.num_virtual_tokens, layers, heads
        prefix = Prefix(values, encoder, sizes, self.num_transformer_submodules)
        prefix.axis = "decoder_" if takes(module, "decoder_input_ids") else ""
        readers = caches.readers(model)
        prefix.enters_attention = set(readers.values()) == set(range(layers))
        again = {name: PrefixAgain(prefix, layer) for name, layer in readers.items()}
        return {path: prefix, **(again if prefix.enters_attention else {}), **self.trained_copies(model)}
