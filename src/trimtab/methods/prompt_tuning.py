"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): the model reads [P; E(x)], P (tokens, D) learned, E frozen.

A hard prompt is the same with a preset text and nothing learned: prompt_tuning_init="TEXT", inference_mode=True.
"""

from enum import StrEnum
from typing import Any, ClassVar, Self

import torch
from pydantic import model_validator
from torch import nn

from .. import tokens, weights
from ..errors import ConfigError
from ..prompts import Prompt, PromptConfig


class PromptTuningInit(StrEnum):
    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class TextConfig(PromptConfig):
    """Settings of the prompts that can begin as a text.

    prompt_tuning_init_text: the text, as tokenizer_name_or_path reads it, repeated or cut to num_virtual_tokens, which
    is by default the text's own length. tokenizer_kwargs: for the tokenizer's `from_pretrained`.
    """

    prompt_tuning_init: str
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _text_has_its_parts(self) -> Self:
        if self.prompt_tuning_init == PromptTuningInit.TEXT:
            for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
                if not getattr(self, name):
                    raise ValueError(f"prompt_tuning_init='TEXT' needs {name} too")
        elif self.tokenizer_kwargs:
            raise ValueError("tokenizer_kwargs are read with prompt_tuning_init='TEXT' only")
        return self

    def resolved(self, model: nn.Module) -> Self:
        config = super().resolved(model)
        if self.num_virtual_tokens is None and self.prompt_tuning_init == PromptTuningInit.TEXT:
            return config.model_copy(update={"num_virtual_tokens": len(self._text())})
        return config

    def beginning(self, table: nn.Embedding, rows: int) -> nn.Parameter:
        """New virtual tokens (rows, D); without values where they are to be read from a file."""
        values = weights.new_parameter(table, rows, table.embedding_dim)
        if self.prompt_tuning_init not in (PromptTuningInit.TEXT, PromptTuningInit.SAMPLE_VOCAB):
            nn.init.normal_(values)
        elif not values.is_meta:
            ids = torch.randint(table.num_embeddings, (rows,))
            if self.prompt_tuning_init == PromptTuningInit.TEXT:
                text = self._text()
                ids = torch.tensor([text[place % len(text)] for place in range(rows)])
                if len(table.weight) <= int(ids.max()):
                    raise ConfigError(f"{self.tokenizer_name_or_path} has more tokens than the model has embeddings.")
            with torch.no_grad():
                values.copy_(table(ids.to(values.device)))
        return values

    def _text(self) -> list[int]:
        assert self.prompt_tuning_init_text is not None
        assert self.tokenizer_name_or_path is not None
        return tokens.read(self.prompt_tuning_init_text, self.tokenizer_name_or_path, self.tokenizer_kwargs or {})


class PromptTuningConfig(TextConfig):
    """Prompt tuning's settings, beside those of all prompts.

    prompt_tuning_init: RANDOM (normal numbers), SAMPLE_VOCAB (embeddings of tokens drawn from the vocabulary) or TEXT.
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    trains: ClassVar[str] = "embeddings of virtual tokens"
    relative_rate: ClassVar[float] = 20.0
    when: ClassVar[str] = (
        "Very large models with many tasks, one small file each, where the model's layers must not be touched."
    )
    evidence: ClassVar[str] = (
        "Among the fewest parameters of all. Lester et al. find it on a par with full fine-tuning from about ten "
        "billion parameters on, and well behind on small models. It wants a large learning rate (the paper's is 0.3) "
        "and many steps; starting from real tokens or a text helps."
    )

    prompt_tuning_init: PromptTuningInit = PromptTuningInit.RANDOM

    def prompt(self, table: nn.Embedding, rows: int) -> Prompt:
        return Prompt(self.beginning(table, rows), self.num_virtual_tokens or rows)
