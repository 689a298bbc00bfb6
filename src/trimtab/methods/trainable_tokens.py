"""Trainable tokens (HF PEFT's method of that name, 2025): train the embeddings of a few tokens, and nothing else.

    e(t) = w_t for the chosen tokens t, W[t] for all others;    w_t trained from W[t]

On an output head the same rows give the logits of the chosen tokens: y_t = w_t x + b_t. Where a model ties its head
(or a second table) to the table, both use the same trained rows.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from .. import weights
from ..adapter import Adapter
from ..errors import ConfigError, TargetError
from ..targets import TargetConfig, base_modules, is_linear, means


class Tokens(nn.Module):
    """The trained rows (tokens, width) of one table, in the order in which the tokens were given."""

    sorted: Tensor
    place: Tensor

    def __init__(self, site: nn.Module, indices: list[int], init: bool) -> None:
        super().__init__()
        stored = weights.parameter(site)
        device = torch.device("cpu") if stored is None or stored.is_meta else stored.device
        self.ids = indices
        ids = torch.tensor(indices, device=device)
        by_size = ids.sort()
        self.register_buffer("sorted", by_size.values, persistent=False)
        self.register_buffer("place", by_size.indices, persistent=False)
        width = table(site).shape[1]
        self.value = weights.new_parameter(site, len(indices), width)
        if not init:  # no identity: for tests, and for those who load weights anyway
            nn.init.normal_(self.value)
        elif not self.value.is_meta:
            self.value.data.copy_(table(site).detach()[ids])

    def change(self, site: nn.Module) -> Tensor:
        """w_t - W[t] (tokens, width), in the order of `sorted`."""
        rows = self.value[self.place]
        return rows - table(site)[self.sorted].to(rows)


class TokensAdapter(Adapter):
    def __init__(self, tokens: Tokens, hf_path: str = "", saved: bool = True) -> None:
        """saved=False: the rows are those of a tied site, which saves them."""
        super().__init__()
        self.hf_path = hf_path
        self.rows = [tokens]  # a list is no sub-module
        if saved:
            self.tokens = tokens

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        tokens = self.rows[0]
        change = tokens.change(site).to(y)
        ids = tokens.sorted.to(y.device)
        if not isinstance(site, nn.Embedding):
            return y.index_add(-1, ids, F.linear(x, change.to(x.dtype)).to(y.dtype))
        place = torch.searchsorted(ids, x).clamp(max=len(ids) - 1)
        chosen = (ids[place] == x)[..., None]
        scale = getattr(site, "embed_scale", 1.0)  # Gemma scales what it looks up
        return y + torch.where(chosen, F.embedding(place, change) * scale, 0.0)

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        tokens = self.rows[0]
        change = tokens.change(site).to(weight)
        ids = tokens.sorted.to(weight.device)
        if isinstance(site, nn.Embedding):  # (out, in): its columns are the table's rows
            return weight.index_add(1, ids, change.T)
        return weight.index_add(0, ids, change)

    def neutral(self, site: nn.Module) -> dict[str, Tensor]:
        return {name: table(site)[self.rows[0].ids] for name in self.state_dict()}

    def hf_key(self, name: str) -> str:
        return self.hf_path + "trainable_tokens_delta"


class TrainableTokensConfig(TargetConfig):
    """Trainable tokens' settings.

    token_indices: the tokens' ids. target_modules: the tables (or output heads); None means the input embedding.
    init_weights=False starts at random.
    """

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    trains: ClassVar[str] = "embeddings of chosen tokens"
    relative_rate: ClassVar[float] = 2.0
    when: ClassVar[str] = (
        "New tokens, or tokens with a new meaning: after resize_token_embeddings, beside LoRA with "
        "trainable_token_indices."
    )
    evidence: ClassVar[str] = (
        "It saves the rows of a few tokens, where modules_to_save would train and save the table whole. It changes "
        "nothing for other tokens, so by itself it teaches no task. No published comparison is known to us."
    )
    example: ClassVar[dict[str, Any]] = {"token_indices": [5, 6]}
    hf_prefix: ClassVar[str] = "trainable_tokens_"
    not_in_hf: ClassVar[frozenset[str]] = frozenset(
        {"exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
    )

    token_indices: list[int] = Field(default=[], validate_default=True)
    init_weights: bool = True

    @field_validator("token_indices")
    @classmethod
    def _some(cls, value: list[int]) -> list[int]:
        if not value:
            raise ValueError("no token is chosen; a tokenizer's convert_tokens_to_ids gives the ids")
        return value

    def default_targets(self, model: nn.Module) -> list[str]:
        return [input_embedding(model)]

    def fits(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding) or is_linear(module)

    def build(self, name: str, site: nn.Module) -> Adapter:
        return TokensAdapter(checked(name, site, self.token_indices, self.init_weights))

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        return with_tied(model, super().adapters(model), saved=True)


def token_adapters(model: nn.Module, indices: dict[str, list[int]] | list[int]) -> dict[str, Adapter]:
    """What another method's `trainable_token_indices` means: ids for the input embedding, or by name of the table."""
    by_name = indices if isinstance(indices, dict) else {input_embedding(model): indices}
    made: dict[str, Adapter] = {}
    for entry, ids in by_name.items():
        found = {name: module for name, module in base_modules(model) if means([entry], name)}
        if not found:
            raise TargetError(f"trainable_token_indices: {entry!r} matches no module of {type(model).__name__}.")
        for name, site in found.items():
            made[name] = TokensAdapter(checked(name, site, ids, True), hf_path="token_adapter.")
    return with_tied(model, made, saved=False)


def with_tied(model: nn.Module, made: dict[str, Adapter], saved: bool) -> dict[str, Adapter]:
    """The adapters, and beside them those of all modules whose weight is the same parameter.

    HF PEFT saves the rows of tied sites once each (saved=True), unless they come with another method.
    """
    modules = {name: module for name, module in base_modules(model) if weights.layout(module)}
    owners: dict[int, TokensAdapter] = {}
    for name, adapter in made.items():
        if isinstance(adapter, TokensAdapter):
            owners.setdefault(id(weights.parameter(modules[name])), adapter)
    for name, module in modules.items():
        owner = owners.get(id(weights.parameter(module)))
        if owner is not None and made.get(name) is not owner:
            if name in made and not isinstance(made[name], TokensAdapter):
                raise TargetError(f"{name} is tied to the table whose tokens are trained, and adapted or saved whole: "
                                  "leave it out of target_modules and modules_to_save.")  # fmt: skip
            made = made | {name: TokensAdapter(owner.rows[0], owner.hf_path, saved)}
    return made


def input_embedding(model: nn.Module) -> str:
    """The name of the table that a model looks its input up in."""
    get = getattr(model, "get_input_embeddings", None)
    wanted = get() if get else None
    tables = [name for name, module in base_modules(model) if isinstance(module, nn.Embedding)]
    found = [name for name, module in base_modules(model) if module is wanted] or tables
    if wanted is None and len(tables) != 1:
        there = f"there is: {', '.join(tables)}" if tables else "it has none"
        raise TargetError(f"{type(model).__name__} does not tell which embedding is that of its input; {there}.")
    return found[0]


def checked(name: str, site: nn.Module, indices: list[int], init: bool) -> Tokens:
    rows = len(table(site))
    if wrong := [index for index in indices if not 0 <= index < rows]:
        near = min(max(wrong[0], 0), rows - 1)
        raise ConfigError(f"{name} has {rows} tokens: {wrong[0]} is none of them. Closest: {near}. "
                          "For new tokens call model.resize_token_embeddings first.")  # fmt: skip
    if twice := sorted({index for index in indices if indices.count(index) > 1}):
        raise ConfigError(f"The token {twice[0]} is listed twice.")
    return Tokens(site, indices, init)


def table(site: nn.Module) -> Tensor:
    """The weight as (tokens, width)."""
    weight = weights.read(site)
    return weight.T if isinstance(site, nn.Embedding) else weight
