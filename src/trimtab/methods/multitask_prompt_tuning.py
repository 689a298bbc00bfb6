"""Multitask prompt tuning (Wang et al. 2023, arXiv 2303.02861): task k reads [P * (u_k v_k); E(x)].

P (tokens, D) is shared by all tasks, u_k (tokens, r) and v_k (r, D) are the task's own; * is entry by entry. Calls say
with task_ids (B,) which task each row is of, unless there is only one. What was learned on source tasks is where a new
task starts from.
"""

from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import files, weights
from ..adapter import Adapter, InputAdapter
from ..errors import AdapterError, ConfigError
from ..prompts import FLAT, Prompt, WiderMask
from ..sites import InputSite
from .prompt_tuning import TextConfig

COLUMNS, ROWS = "prefix_task_cols", "prefix_task_rows"


class MultitaskPromptTuningInit(StrEnum):
    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


class TaskSite(InputSite):
    """A site that is told of which task each row is."""

    more = ("task_ids",)


class MultitaskPrompt(Prompt):
    site: ClassVar[Any] = TaskSite
    hf_computed = ()
    hf_names: ClassVar[dict[str, str]] = {"embedding": FLAT, "u": COLUMNS, "v": ROWS}

    def __init__(self, embedding: nn.Parameter, tokens: int, u: nn.Parameter, v: nn.Parameter) -> None:
        """u (tasks, rows of the embedding, r), v (tasks, r, D)."""
        super().__init__(embedding, tokens)
        self.u, self.v = u, v
        self.rank = u.shape[2], min(u.shape[1], v.shape[2])
        self.tasks: Tensor | None = None  # what a call of the root said, where this is not the root

    def hf_key(self, name: str) -> str:
        return self.hf_names[name]

    def virtual(self, rows: int, given: dict[str, Any]) -> Tensor:
        tasks = given.get("task_ids")
        tasks = self.tasks if tasks is None else tasks
        if tasks is None and len(self.u) == 1:
            tasks = torch.zeros(rows, dtype=torch.long)
        if tasks is None or tuple(tasks.shape) != (rows,):
            got = None if tasks is None else tuple(tasks.shape)
            raise AdapterError(f"Give task_ids ({rows},), which say of which task each row is; got {got}.")
        tasks = tasks.to(self.u.device)
        own: Tensor = self.embedding * (self.u[tasks] @ self.v[tasks])
        return own[:, : self.tokens]


class TasksBelow(InputAdapter):
    """At the root of a model that reads its tokens in a part: tells the prompt there what the call says of tasks."""

    site: ClassVar[Any] = TaskSite
    fills_behind = True

    def __init__(self, prompt: MultitaskPrompt, wider: WiderMask | None) -> None:
        super().__init__()
        self.prompt, self.wider = (prompt,), wider  # in a tuple, or its weights would be here too
        self.ahead = wider.ahead if wider else 0

    def inputs(self, site: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        self.prompt[0].tasks = given.get("task_ids")
        return self.wider.inputs(site, given) if self.wider else given

    def outputs(self, site: nn.Module, given: dict[str, Any], result: Any) -> Any:
        self.prompt[0].tasks = None
        return result


class MultitaskPromptTuningConfig(TextConfig):
    """Multitask prompt tuning's settings, beside those of prompts.

    num_tasks; num_ranks: r. prompt_tuning_init: RANDOM, TEXT, or from the file (or adapter's folder)
    prompt_tuning_init_state_dict_path: P and the mean of the tasks' own parts (AVERAGE_SOURCE_TASKS), P and the part of
    the task prompt_tuning_init_task (EXACT_SOURCE_TASK), or P alone (ONLY_SOURCE_SHARED).
    """

    peft_type: ClassVar[str] = "MULTITASK_PROMPT_TUNING"
    trains: ClassVar[str] = "a shared prompt, low-rank parts per task"
    relative_rate: ClassVar[float] = 320.0
    when: ClassVar[str] = "Several related tasks, or a new one with few examples that can start from them."
    evidence: ClassVar[str] = (
        "Wang et al. report it ahead of prompt tuning on 23 data sets, with 0.035 % of the parameters for each task. "
        "Every call needs task_ids where there are several tasks; with one it is a prompt with more to learn."
    )
    hf_prefix: ClassVar[str] = "pr"

    prompt_tuning_init: MultitaskPromptTuningInit = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = Field(default=0, ge=0)
    num_ranks: int = Field(default=1, ge=1)
    num_tasks: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _source_is_named(self) -> Self:
        if "SOURCE" in self.prompt_tuning_init and not self.prompt_tuning_init_state_dict_path:
            name = "prompt_tuning_init_state_dict_path"
            raise ValueError(f"prompt_tuning_init='{self.prompt_tuning_init}' needs {name} too")
        return self

    def resolved(self, model: nn.Module) -> Self:
        if self.num_transformer_submodules == 2:
            raise ConfigError("num_transformer_submodules=2 would put tokens before the decoder's input too, which HF "
                              "PEFT does in training and not in generation. Set it to 1.")  # fmt: skip
        return TextConfig.resolved(self.model_copy(update={"num_transformer_submodules": 1}), model)

    def prompt(self, table: nn.Embedding, rows: int) -> Prompt:
        embedding = self.beginning(table, rows)
        u = weights.new_parameter(table, self.num_tasks, rows, self.num_ranks)
        v = weights.new_parameter(table, self.num_tasks, self.num_ranks, table.embedding_dim)
        for parameter in (u, v):
            nn.init.normal_(parameter, std=0.02)
        if "SOURCE" in self.prompt_tuning_init and not embedding.is_meta:
            self._take_over(embedding, u, v)
        return MultitaskPrompt(embedding, self.num_virtual_tokens or rows, u, v)

    @torch.no_grad()
    def _take_over(self, embedding: nn.Parameter, u: nn.Parameter, v: nn.Parameter) -> None:
        path = Path(str(self.prompt_tuning_init_state_dict_path))
        try:
            source = load_file(files.current(path, files.WEIGHTS) if path.is_dir() else path)
            shared, columns, rows = source[FLAT], source[COLUMNS], source[ROWS]
        except (OSError, SafetensorError, KeyError) as error:
            raise ConfigError(f"prompt_tuning_init_state_dict_path={str(path)!r} is no safetensors file of such an "
                              f"adapter: {error!r}.") from None  # fmt: skip
        if self.prompt_tuning_init == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
            columns, rows = columns.mean(0), rows.mean(0)
        elif self.prompt_tuning_init_task < len(columns):
            columns, rows = columns[self.prompt_tuning_init_task], rows[self.prompt_tuning_init_task]
        else:
            raise ConfigError(f"prompt_tuning_init_task={self.prompt_tuning_init_task}: of {len(columns)} tasks.")
        take = {FLAT: (embedding, shared)}
        if self.prompt_tuning_init != MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
            take |= {COLUMNS: (u, columns), ROWS: (v, rows)}
        for key, (parameter, value) in take.items():
            if value.shape != parameter.shape[-2:]:
                raise ConfigError(f"{path} has {key} {tuple(value.shape)}; {tuple(parameter.shape[-2:])} is needed.")
            parameter.copy_(value)

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        path, prompt = next((path, found) for path, found in made.items() if isinstance(found, MultitaskPrompt))
        if path:
            wider = made.get("")
            made[""] = TasksBelow(prompt, wider if isinstance(wider, WiderMask) else None)
        return made
