"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190): attention(Q, [P_k; K], [P_v; V]) in every layer, P learned.

P is (tokens, layers * 2 * heads * width of a head), the heads being those of keys and values, of which there are
fewer than queries under grouped-query attention. With a projection, P = W2 tanh(W1 H + b1) + b2 with H, W, b learned
(the paper's reparameterisation); after training only P matters.

The prefix enters through the key-value cache, so positions of the real tokens begin behind it.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

from pydantic import Field
from torch import Tensor, nn

from .. import caches, weights
from ..adapter import Adapter
from ..errors import AdapterError, ConfigError, TargetError
from ..prompts import PromptLearningConfig, VirtualTokens, cached, named, setting, takes, text_config, unnamed
from ..targets import base_modules


class Prefix(VirtualTokens):
    def __init__(
        self,
        embedding: nn.Parameter,
        encoder: nn.Module | None,
        *,
        tokens: int,
        heads: int,
        width: int,
        step: int,
        decodes: bool,
    ) -> None:
        """heads, width: of keys and values. step: HF PEFT's num_transformer_submodules."""
        super().__init__(embedding, tokens, encoder)
        self.heads, self.width, self.step = heads, width, step
        self.where = "decoder_" if decodes else ""

    def inputs(self, site: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        if site.training and any(getattr(module, "gradient_checkpointing", False) for module in site.modules()):
            raise AdapterError(
                "Prefix tuning goes through the key-value cache, which transformers drops in checkpointed layers. "
                "Train without gradient checkpointing, or with PromptTuningConfig."
            )
        new = self.behind(given, self.where)
        if not cached(given):
            new["past_key_values"] = caches.filled(site, given.get("past_key_values"), self.states(site, given))
        return named(site, new)

    def outputs(self, site: nn.Module, given: dict[str, Any], result: Any) -> Any:
        if given.get("past_key_values") is None and not setting(site, given, "use_cache"):
            # or generate would go on from a cache it did not ask for
            result = type(result)(**{name: value for name, value in result.items() if name != "past_key_values"})
        return unnamed(site, given, result)

    def states(self, site: nn.Module, given: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values (B, heads, P, width of a head) of each layer."""
        names = [f"{where}{name}" for where in (self.where, "") for name in ("input_ids", "inputs_embeds")]
        rows = next(len(given[name]) for name in (*names, "labels") if given.get(name) is not None)
        pairs = self().to(weights.compute_dtype(site)).view(self.tokens, -1, 2, self.heads, self.width)
        pairs = pairs.permute(1, 2, 3, 0, 4)  # (layers, 2, heads, P, width of a head)
        for layer in range(len(pairs)):
            # With a step of 2 (encoder-decoders) HF PEFT skips every other pair; so must who reads its adapters.
            keys, values = pairs[self.step * layer % len(pairs)].unsqueeze(1).expand(-1, rows, -1, -1, -1)
            yield keys, values


class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning's settings, beside those of all virtual tokens.

    prefix_projection: make the prefix by a two-layer MLP of width encoder_hidden_size (by default token_dim) while
    training. init_weights: None (normal numbers, or what the MLP makes of them) or "zero". token_dim and
    num_attention_heads are those of keys: all heads together, and their number.
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    encoder_hidden_size: int | None = Field(None, ge=1)
    prefix_projection: bool = False
    init_weights: Literal["zero"] | None = None

    def resolved(self, model: nn.Module) -> Self:
        config = super().resolved(model)
        _reader(model)
        layers, heads, width = _sizes(model)
        for name, found in {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * width}.items():
            if getattr(self, name) not in (None, found):
                raise ConfigError(f"{name}={getattr(self, name)}, but in {type(model).__name__} it is {found}.")
            config = config.model_copy(update={name: found})
        return config.model_copy(update={"encoder_hidden_size": self.encoder_hidden_size or heads * width})

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        assert self.num_virtual_tokens is not None
        assert self.num_transformer_submodules is not None
        path, module = _reader(model)
        layers, heads, width = _sizes(model)
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
        prefix = Prefix(
            values,
            encoder,
            tokens=self.num_virtual_tokens,
            heads=heads,
            width=width,
            step=self.num_transformer_submodules,
            decodes=takes(module, "decoder_input_ids"),
        )
        return {path: prefix, **self.trained_copies(model)}


def _reader(model: nn.Module) -> tuple[str, nn.Module]:
    """The module that takes a cache of keys and values: the root, or the base model below a head."""
    base = getattr(model, "base_model", model)
    for module in (model, base):
        if takes(module, "past_key_values"):
            return next(((name, found) for name, found in base_modules(model) if found is module), ("", model))
    raise TargetError(
        f"{type(model).__name__} takes no past_key_values, through which a prefix enters attention. Use a method at "
        "layers, such as LoraConfig."
    )


def _sizes(model: nn.Module) -> tuple[int, int, int]:
    """Numbers of layers and of heads of keys and values in them, and the width of a head."""
    config = text_config(model, decoder=True)
    if getattr(config, "is_heterogeneous", False) or getattr(config, "global_head_dim", None):
        raise TargetError(f"{type(model).__name__} has layers with heads of different sizes, which no one prefix fits.")
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    return layers, getattr(config, "num_key_value_heads", None) or heads, width
