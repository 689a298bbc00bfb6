"""CPT, context-aware prompt tuning (Blau et al. 2024, arXiv 2410.17222): the model reads [C + D; E(x)], |D_i| <= eps_i.

C (tokens, n) are the embeddings of a context of examples, D what is learned. After each step of the optimizer every
row D_i is put back into a ball of radius

    eps_i = eps sqrt(n / 2048)     eps that of formats (types 1, 3), that of inputs (type 2), 0 for labels (types 0, 4)

A type counts on through the context by fours: 1 to 4 are input format, input, output format and label of the first
example, 5 to 8 those of the second. The loss is cross-entropy on the labels of the context and of the rows, and with
k label types after it in its row that of a label is weighted by gamma^k (opt_weighted_loss_type="decay").

What is trained is C + D, so the projection is the method's step after the optimizer's. HF PEFT trains D: with weight
decay it draws towards C, this towards 0. Types of the rows are counted on from the context's last whole example; HF
PEFT adds the greatest type as it is, and where that is no multiple of 4 takes other tokens for labels.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .. import weights
from ..adapter import Adapter, TaskType
from ..errors import AdapterError, ConfigError
from ..prompts import Prompt, PromptConfig, cached
from ..sites import InputSite

FORMATS, INPUTS, LABELS = (1, 3), (2,), (0,)  # types modulo 4


class TypedSite(InputSite):
    """A site that is told of which type each token is."""

    more = ("input_type_mask",)


class ContextPrompt(Prompt):
    site: ClassVar[Any] = TypedSite

    context: Tensor  # C (P, n)
    ids: Tensor  # (P,)
    types: Tensor  # (P,)
    radius: Tensor  # eps (P, 1)

    def __init__(self, embedding: nn.Parameter, table: nn.Embedding, config: "CPTConfig") -> None:
        assert config.cpt_token_ids is not None
        assert config.cpt_tokens_type_mask is not None
        super().__init__(embedding, len(embedding))
        self.causal = config.task_type == TaskType.CAUSAL_LM
        self.gamma = config.opt_loss_decay_factor if config.opt_weighted_loss_type == "decay" else 1.0
        place = weights.device(table)
        ids, types = (
            torch.tensor(values, device=place) for values in (config.cpt_token_ids, config.cpt_tokens_type_mask)
        )
        radius = torch.zeros(len(types), device=place)
        for kinds, eps in (
            (FORMATS, config.opt_projection_format_epsilon),
            (INPUTS, config.opt_projection_epsilon),
        ):
            radius[_among(types, kinds)] = eps * (table.embedding_dim / 2048) ** 0.5
        with torch.no_grad():
            context = table(ids).to(embedding.dtype)
        # Not saved: they follow from the config and the base.
        for name, value in {"context": context, "ids": ids, "types": types, "radius": radius[:, None]}.items():
            self.register_buffer(name, value, persistent=False)
        if not embedding.is_meta:
            embedding.data.copy_(context)

    def forward(self) -> Tensor:
        labels = _among(self.types, LABELS)[:, None]
        return torch.where(labels, self.embedding.detach(), self.embedding)

    def inputs(self, site: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        if self.causal and not cached(given):
            given = {**given, "labels": None}  # the loss is made here, of more than these
        return super().inputs(site, given)

    def outputs(self, site: nn.Module, given: dict[str, Any], result: Any) -> Any:
        labels = given.get("labels")
        if self.causal and labels is not None and result.get("loss") is None:
            loss = self.loss(result.logits, labels, given)
            result = type(result)(**{**result, "loss": loss})
        return super().outputs(site, given, result)

    def loss(self, logits: Tensor, labels: Tensor, given: Mapping[str, Any]) -> Tensor:
        """The mean over all labels; of several batches of one step (`num_items_in_batch`) the rows' share of it."""
        rows = len(labels)
        types = given.get("input_type_mask")
        types = torch.full_like(labels, 4) if types is None else types.to(labels)
        shape = (rows, logits.shape[1] - self.tokens)
        if not types.shape == labels.shape == shape:
            raise AdapterError(f"labels {tuple(labels.shape)}, or their types in input_type_mask {tuple(types.shape)}, "
                               f"do not fit the tokens {shape}, one for one.")  # fmt: skip
        before = -(-int(self.types.max()) // 4) * 4
        types = torch.cat([self.types.expand(rows, -1), torch.where(types > 0, types + before, 0)], 1)[:, 1:]
        is_label = (types > 0) & _among(types, LABELS)
        targets = torch.cat([self.ids.expand(rows, -1), labels], 1)[:, 1:].where(is_label, -100)
        each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")  # (B, P + T - 1)
        counted = targets != -100
        decay = torch.ones_like(each)
        for row, found, own in zip(types, is_label, decay, strict=True):
            kinds = row[found].unique()  # sorted
            own[found] = self.gamma ** (len(kinds) - 1 - torch.searchsorted(kinds, row[found])).to(own)
        mean = (each * decay)[counted].mean()
        items = given.get("num_items_in_batch")
        return mean if items is None else mean * (labels[:, 1:] != -100).sum() / items

    def project(self) -> None:
        change = self.embedding - self.context
        length = change.norm(dim=1, keepdim=True)
        nearest = self.context + change * (self.radius / length)
        self.embedding.copy_(torch.where(length > self.radius, nearest, self.embedding))


def _among(types: Tensor, kinds: tuple[int, ...]) -> Tensor:
    return torch.isin(types % 4, torch.tensor(kinds, device=types.device))


class CPTConfig(PromptConfig):
    """CPT's settings, beside those of all prompts.

    cpt_token_ids: the context's tokens. cpt_tokens_type_mask: the type of each, 1 (format) by default; in a call
    `input_type_mask` (batch, length) says the same of the rows, all labels by default. opt_projection_epsilon,
    opt_projection_format_epsilon: eps of inputs and of formats. opt_weighted_loss_type, opt_loss_decay_factor: "decay"
    and gamma. This loss is that of the task CAUSAL_LM; with other models the loss is their own.
    cpt_mask: all ones. tokenizer_name_or_path: whose ids those are, for the record.
    """

    peft_type: ClassVar[str] = "CPT"
    example: ClassVar[dict[str, Any]] = {"cpt_token_ids": [5, 6, 7]}
    trains: ClassVar[str] = "the embeddings of a context of examples"
    relative_rate: ClassVar[float] = 80.0
    when: ClassVar[str] = "Classification by a decoder with so few examples that all of them go into the prompt."
    evidence: ClassVar[str] = (
        "Blau et al. report it ahead of in-context learning, which is where it begins, and of prompt tuning: the ball "
        "keeps it from overfitting. It keeps it from learning much from many examples, too, every call pays for the "
        "whole context, and the radii want tuning."
    )

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] = "none"
    opt_loss_decay_factor: float = Field(default=1.0, gt=0, le=1)
    opt_projection_epsilon: float = Field(default=0.1, ge=0)
    opt_projection_format_epsilon: float = Field(default=0.1, ge=0)
    tokenizer_name_or_path: str | None = None

    def resolved(self, model: nn.Module) -> Self:
        if not self.cpt_token_ids:
            raise ConfigError("CPT begins at a context of real tokens: give cpt_token_ids.")
        tokens = len(self.cpt_token_ids)
        for name, only in {"num_virtual_tokens": tokens, "num_transformer_submodules": 1}.items():
            if getattr(self, name) not in (None, only):
                raise ConfigError(f"{name}={getattr(self, name)}: with these cpt_token_ids it is {only}.")
        mask, types = self.cpt_mask or [1] * tokens, self.cpt_tokens_type_mask or [1] * tokens
        if mask != [1] * tokens:
            raise ConfigError("cpt_mask must have a 1 for each of cpt_token_ids, for the model sees them all, in HF "
                              "PEFT too. Leave out the tokens that it is not to see.")  # fmt: skip
        if len(types) != tokens or min(types) < 0:
            raise ConfigError(f"cpt_tokens_type_mask must have a type from 0 on for each of the {tokens} tokens.")
        decays = self.opt_weighted_loss_type == "decay"
        if decays and self.task_type != TaskType.CAUSAL_LM:
            raise ConfigError("opt_weighted_loss_type='decay' is about the loss of task_type='CAUSAL_LM'.")
        if not decays and self.opt_loss_decay_factor != 1:
            raise ConfigError("opt_loss_decay_factor needs opt_weighted_loss_type='decay'.")
        found: dict[str, Any] = {"num_virtual_tokens": tokens, "num_transformer_submodules": 1}
        found |= {"cpt_mask": mask, "cpt_tokens_type_mask": types}
        return PromptConfig.resolved(self.model_copy(update=found), model)

    @property
    def makes_loss(self) -> bool:
        return self.task_type == TaskType.CAUSAL_LM

    def prompt(self, table: nn.Embedding, rows: int) -> Prompt:
        assert self.cpt_token_ids is not None
        if not 0 <= min(self.cpt_token_ids) <= max(self.cpt_token_ids) < table.num_embeddings:
            raise ConfigError(f"cpt_token_ids are ids below {table.num_embeddings}, the model's number of embeddings.")
        return ContextPrompt(weights.new_parameter(table, rows, table.embedding_dim), table, self)

    def stepped(self, adapters: Mapping[str, Adapter], optimizer: Optimizer) -> None:
        for adapter in adapters.values():
            if isinstance(adapter, ContextPrompt):
                adapter.project()
