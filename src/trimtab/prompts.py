"""Virtual tokens: what prompt tuning, P-tuning and prefix tuning share.

Shapes: B rows, T tokens of the user's, P virtual tokens before them, D the embedding's width.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from .adapter import Adapter, InputAdapter, TaskType
from .errors import AdapterError, ConfigError, TargetError
from .targets import SavedModulesConfig, base_modules, takes

FLAT = "prompt_embeddings"  # HF PEFT's one key for all that these methods learn
DEFAULT_TOKENS = 20


class VirtualTokens(InputAdapter):
    """Learned numbers (rows, width), which an encoder may make out of others while training.

    HF PEFT's file holds the numbers alone. With an encoder, ours holds its weights as well, under keys that HF PEFT
    passes over, so that training can go on; a file without them gives an adapter without an encoder.
    """

    hf_flat: ClassVar[bool] = True
    hf_computed: tuple[str, ...] = (FLAT,)
    alone: ClassVar[bool] = True
    encoder: nn.Module | None

    def __init__(self, embedding: nn.Parameter, tokens: int, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding, self.tokens = embedding, tokens
        self.ahead = tokens
        self.encoder = encoder.to(embedding.device, embedding.dtype) if encoder is not None else None

    def forward(self) -> Tensor:
        return self.embedding if self.encoder is None else cast(Tensor, self.encoder(self.embedding))

    def hf_key(self, name: str) -> str:
        return FLAT if self.encoder is None else f"prompt_encoder.{name}"

    def computed(self) -> dict[str, Tensor]:
        return {} if self.encoder is None else {FLAT: self()}

    def expect(self, keys: Collection[str]) -> None:
        if self.encoder is None or any(self.hf_key(name) in keys for name in self.state_dict()):
            return
        with torch.no_grad():
            flat = self()
        self.embedding, self.encoder = nn.Parameter(flat, requires_grad=self.embedding.requires_grad), None

    def behind(self, given: dict[str, Any], where: str = "") -> dict[str, Any]:
        """The arguments with mask and positions for tokens that come after P virtual ones in the cache.

        Args:
            where: "decoder_" for the arguments of a decoder.
        """
        mask, positions = given.get(f"{where}attention_mask"), given.get(f"{where}position_ids")
        new = dict(given)
        if mask is not None:
            new[f"{where}attention_mask"] = widened(mask, self.tokens)
            seen, length = cached(given), _length(given, where)
            if seen and mask.shape[1] != seen - self.tokens + length:
                raise AdapterError(
                    f"A cache of {seen} positions, {self.tokens} of them virtual, and {length} new tokens do not make "
                    f"the {mask.shape[1]} of attention_mask. Was the cache filled without this adapter, or given to "
                    "generate, which does not count virtual tokens? Start without past_key_values."
                )
        if positions is not None:
            new[f"{where}position_ids"] = positions + self.tokens
        return new


class Prompt(VirtualTokens):
    """Virtual tokens at the embedding: the model reads [prompt; embedding(input_ids)].

    The result is that of the user's own tokens: logits and hidden states of the virtual positions are cut off (HF
    PEFT returns them). Attention maps, and what an encoder gives to its decoder, keep them.
    """

    feeds_decoder = False  # whether the site is the encoder of an encoder-decoder

    def inputs(self, site: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        if cached(given):
            return self.behind(given)
        embeds = given.get("inputs_embeds")
        if embeds is None:
            ids = given.get("input_ids")
            if ids is None or ids.dim() != 2:
                raise AdapterError("Virtual tokens go before input_ids of shape (batch, length), or inputs_embeds.")
            embeds = site.get_input_embeddings()(ids)  # type: ignore[operator]  # (B, T, D)
        rows, length = embeds.shape[:2]
        virtual = self.virtual(rows, given).to(embeds)
        new = {**given, "input_ids": None, "inputs_embeds": torch.cat([virtual, embeds], 1)}
        mask = given.get("attention_mask")
        # A decoder beside reads the same mask, so at the root `WiderMask` has widened it for both.
        if mask is not None and not (self.feeds_decoder and mask.shape[-1] == length + self.tokens):
            new["attention_mask"] = widened(mask, self.tokens)
        if (places := given.get("position_ids")) is not None:
            first = torch.arange(self.tokens, device=places.device).expand(*places.shape[:-1], -1)
            new["position_ids"] = torch.cat([first, places + self.tokens], -1)
        if (types := given.get("token_type_ids")) is not None:
            new["token_type_ids"] = _before(types, self.tokens, 0)
        if (labels := given.get("labels")) is not None and labels.dim() == 2 and not labels.is_floating_point():
            if labels.shape != (rows, length):
                raise AdapterError(f"labels {tuple(labels.shape)} do not fit the tokens {(rows, length)}, one for one.")
            new["labels"] = _before(labels, self.tokens, -100)
        return named(site, new)

    def virtual(self, rows: int, given: dict[str, Any]) -> Tensor:
        """What goes before the embeddings: (B, P, D)."""
        numbers: Tensor = self()
        return numbers[: self.tokens].expand(rows, -1, -1)

    def outputs(self, site: nn.Module, given: dict[str, Any], result: Any) -> Any:
        if self.feeds_decoder or not isinstance(result, Mapping):
            return result
        whole = _length(given) + self.tokens

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(cut(part) for part in value)
            of_positions = isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == whole
            return value[:, self.tokens :] if of_positions else value

        return unnamed(site, given, type(result)(**{name: cut(value) for name, value in result.items()}))


class WiderMask(InputAdapter):
    """At the root of an encoder-decoder whose encoder has a `Prompt`: the decoder attends to its tokens too."""

    fills_behind = True

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = self.ahead = tokens

    def inputs(self, site: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        mask = given.get("attention_mask")
        return given if mask is None else {**given, "attention_mask": widened(mask, self.tokens)}


def cached(given: Mapping[str, Any]) -> int:
    """The number of positions that lie in the cache already."""
    past = given.get("past_key_values")
    if past is not None and getattr(past, "is_compileable", False):
        raise AdapterError("A static cache has no room for virtual tokens. The dynamic one, the default, has.")
    return int(past.get_seq_length()) if past is not None else 0


def widened(mask: Any, tokens: int) -> Tensor:
    """The mask (B, T) with ones for the virtual tokens before it: (B, P + T)."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise AdapterError("Virtual tokens need an attention_mask of shape (batch, length), not one for each query.")
    return _before(mask, tokens, 1)


def _before(values: Tensor, tokens: int, fill: int) -> Tensor:
    return torch.cat([values.new_full((len(values), tokens), fill), values], 1)


def _length(given: Mapping[str, Any], where: str = "") -> int:
    ids = given.get(f"{where}input_ids")
    return int((ids if ids is not None else given[f"{where}inputs_embeds"]).shape[1])


def named(site: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that give a result with names, which tell its parts from each other."""
    return given if setting(site, given, "return_dict") else {**given, "return_dict": True}


def unnamed(site: nn.Module, given: Mapping[str, Any], result: Any) -> Any:
    """The result as the caller asked for it: with names or, in the end, as a tuple."""
    return result if setting(site, given, "return_dict") else result.to_tuple()


def setting(site: nn.Module, given: Mapping[str, Any], name: str) -> bool:
    """An argument for which the model's config has the default."""
    value = given.get(name)
    return bool(getattr(getattr(site, "config", None), name, True) if value is None else value)


class PromptLearningConfig(SavedModulesConfig):
    """Settings of the methods with virtual tokens.

    num_virtual_tokens: how many; 20 by default. token_dim, num_layers, num_attention_heads: the model's sizes, found
    out by themselves. num_transformer_submodules: 2 for the task SEQ_2_SEQ_LM, else 1, as in HF PEFT.
    """

    hf_root: ClassVar[str] = "base_model."
    hf_prefix: ClassVar[str] = FLAT

    num_virtual_tokens: int | None = Field(default=None, ge=1)
    token_dim: int | None = Field(default=None, ge=1)
    num_transformer_submodules: int | None = Field(default=None, ge=1, le=2)
    num_attention_heads: int | None = Field(default=None, ge=1)
    num_layers: int | None = Field(default=None, ge=1)

    @property
    def acts_on_rows(self) -> bool:
        return True

    def resolved(self, model: nn.Module) -> Self:
        config = super().resolved(model)
        sizes: Any = getattr(model, "config", None)
        sizes = sizes.get_text_config() if hasattr(sizes, "get_text_config") else sizes
        submodules = 2 if self.task_type == TaskType.SEQ_2_SEQ_LM else 1
        found = {
            "num_virtual_tokens": DEFAULT_TOKENS,
            "num_transformer_submodules": submodules,
            "num_layers": getattr(sizes, "num_hidden_layers", None),
            "num_attention_heads": getattr(sizes, "num_attention_heads", None),
        }
        return config.model_copy(update={name: new for name, new in found.items() if getattr(config, name) is None})


class PromptConfig(PromptLearningConfig):
    """Settings of the methods whose virtual tokens enter at the embedding (`Prompt`)."""

    def resolved(self, model: nn.Module) -> Self:
        config = super().resolved(model)
        width = embedding(reader(model)[1]).embedding_dim
        if self.token_dim not in (None, width):
            raise ConfigError(f"token_dim={self.token_dim}, but the embeddings of {type(model).__name__} have {width}.")
        return config.model_copy(update={"token_dim": width})

    @abstractmethod
    def prompt(self, table: nn.Embedding, rows: int) -> Prompt:
        """New virtual tokens (rows, token_dim); `table` has the model's own."""

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        assert self.num_virtual_tokens is not None
        assert self.num_transformer_submodules is not None
        path, module = reader(model)
        # Of a prompt for encoder and decoder HF PEFT saves both halves, and uses the first: so does this.
        prompt = self.prompt(embedding(module), self.num_virtual_tokens * self.num_transformer_submodules)
        prompt.fills_behind = bool(path)  # what reads for a head may look at the first position
        made: dict[str, Adapter] = {path: prompt}
        if takes(model, "decoder_input_ids"):
            prompt.feeds_decoder = True
            made[""] = WiderMask(self.num_virtual_tokens)
        return made | self.trained_copies(model)


def reader(model: nn.Module) -> tuple[str, nn.Module]:
    """The module before whose input virtual tokens go, with its name.

    That is the encoder of an encoder-decoder; the base model below a head that knows tokens by their place (the last
    one that is no padding, the start of an answer); and the root of a language model, where the last virtual token
    learns to predict the first real one.

    Raises:
        TargetError: the model reads no tokens, or takes them as ids only.
    """
    module = model
    if takes(model, "decoder_input_ids"):
        module = model.get_encoder()  # type: ignore[operator]
    elif takes(base := getattr(model, "base_model", model), "inputs_embeds") and not _predicts_tokens(model):
        module = base
    path = next((name for name, found in base_modules(model) if found is module), "")
    if not takes(module, "inputs_embeds"):
        raise TargetError(
            f"{type(module).__name__} takes no inputs_embeds, so virtual tokens cannot go before its input. Use a "
            "method at layers, such as LoraConfig."
        )
    embedding(module)
    return path, module


def _predicts_tokens(model: nn.Module) -> bool:
    try:
        return model.get_output_embeddings() is not None  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return False


def embedding(module: nn.Module) -> nn.Embedding:
    """The table of token embeddings that a model's input goes through."""
    try:
        found = module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Embedding):
        raise TargetError(
            f"{type(module).__name__} has no table of token embeddings, so virtual tokens cannot go before its input. "
            "Use a method at layers, such as LoraConfig."
        )
    return found
