"""Poly (Ponti et al. 2022, arXiv 2202.13914): y = W x + (1 / r) B_t A_t x, each task's own mixture of shared LoRAs.

    A_t = sum over skills s of w_ts A_s, B_t alike,    w_ts = z_ts / sum over s of z_ts,  z = sigmoid(logits)

In training z is drawn from a relaxed Bernoulli distribution: sigmoid(logits + log u - log(1 - u)), u uniform, for each
row. With n_splits > 1 (multi-head routing, Page-Caccia et al. 2022, arXiv 2211.03831) the inputs and the outputs are
cut into as many parts, each with weights of its own. Calls say with task_ids (B,) which task each row is of, unless
there is only one.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import weights
from ..adapter import Adapter, InputAdapter
from ..errors import AdapterError, ConfigError, MergeError, closest_divisor
from ..prompts import reader
from ..targets import TargetConfig, is_linear, takes
from .multitask_prompt_tuning import TaskSite

LEAST = 1e-12  # that the sum of z is taken for


class TaskIds(InputAdapter):
    """At the root: what the call says of tasks. At an encoder, which `generate` calls by itself: tells the root's."""

    site: ClassVar[Any] = TaskSite

    def __init__(self, tasks: int, root: "TaskIds | None" = None) -> None:
        super().__init__()
        self.tasks, self.root = tasks, (root,)  # in a tuple, or it would be a part of this
        self.given: Tensor | None = None

    def inputs(self, site: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        ids, root = given.get("task_ids"), self.root[0]
        if ids is not None and (ids.dim() != 1 or not 0 <= int(ids.min()) <= int(ids.max()) < self.tasks):
            raise AdapterError(f"task_ids must be one number from 0 to {self.tasks - 1} for each row; got {ids}.")
        if root is None:
            self.given = ids
        elif ids is not None:
            root.given = ids
        return given

    def outputs(self, site: nn.Module, given: dict[str, Any], result: Any) -> Any:
        if not torch.is_grad_enabled():  # else kept for computing again in the backward pass
            self.given = None
        return result


class PolyAdapter(Adapter):
    draws: ClassVar[bool] = True
    hf_names: ClassVar[dict[str, str]] = {
        "A": "poly_lora_A", "B": "poly_lora_B", "logits": "poly_router.module_logits"
    }  # fmt: skip

    def __init__(self, site: nn.Module, r: int, tasks: int, skills: int, splits: int, init: bool) -> None:
        """A (splits, skills, in / splits, r), B (splits, skills, r, out / splits), logits (tasks, splits skills)."""
        super().__init__()
        shape = weights.layout(site)
        assert shape is not None
        self.A = weights.new_parameter(site, splits, skills, shape.into // splits, r)
        self.B = weights.new_parameter(site, splits, skills, r, shape.out // splits)
        self.logits = weights.new_parameter(site, tasks, splits * skills)
        self.rank = r, min(shape.out, shape.into)
        self.ids: tuple[TaskIds] | None = None  # in a tuple, or it would be a part of this
        nn.init.uniform_(self.A, -1 / math.sqrt(self.A.shape[2]), 1 / math.sqrt(self.A.shape[2]))
        nn.init.uniform_(self.logits, -1e-3, 1e-3)
        if init:
            nn.init.zeros_(self.B)
        else:  # no identity: for tests, and for those who load weights anyway
            nn.init.uniform_(self.B, -1 / math.sqrt(r), 1 / math.sqrt(r))

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        A, B = (part.to(x.dtype) for part in self._mixed(self._tasks(x)))
        if len(A) == 1:
            return y + (x @ A[0] @ B[0]).to(y.dtype)
        return y + (x.reshape(len(A), -1, x.shape[-1]) @ A @ B).view(y.shape).to(y.dtype)

    def _tasks(self, x: Tensor) -> Tensor:
        """Of each row; where rows and tokens are one dimension, of each token. One for all, where nothing differs."""
        if self.ids is None:
            rows = len(x) if self.training and x.dim() > 1 else 1
            return torch.zeros(rows, dtype=torch.long, device=self.logits.device)
        tasks = self.ids[0].given
        if tasks is None or len(x) % len(tasks) or (len(x) != len(tasks) and x.dim() > 2):
            got = None if tasks is None else tuple(tasks.shape)
            raise AdapterError(f"Give task_ids ({len(x)},), which say of which task each row is; got {got}.")
        return tasks.to(self.logits.device).repeat_interleave(len(x) // len(tasks))

    def _mixed(self, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """A (B, in, r) and B / r (B, r, out) of these tasks."""
        splits, skills, _, r = self.A.shape
        logits = self.logits[tasks].view(-1, splits, skills)
        if self.training:
            u = torch.rand_like(logits).clamp(torch.finfo(logits.dtype).tiny, 1 - torch.finfo(logits.dtype).eps)
            logits = logits + torch.log(u) - torch.log1p(-u)
        z = torch.sigmoid(logits)
        w = z / (z.sum(-1, keepdim=True) + LEAST)
        A = torch.einsum("bqs,qsir->bqir", w, self.A).flatten(1, 2)
        B = torch.einsum("bqs,qsro->brqo", w, self.B).flatten(2, 3)
        return A, B / r

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        pair = self.low_rank(site)
        if pair is None:
            raise MergeError(
                "Poly acts on each row by its task, and a weight acts on all alike. Keep the adapter attached instead."
            )
        return weight + (pair[0] @ pair[1]).to(weight.dtype)

    def low_rank(self, site: nn.Module) -> tuple[Tensor, Tensor] | None:
        if len(self.logits) > 1:
            return None
        training = self.training
        try:
            self.training = False  # the mean of what is drawn, as in evaluation
            A, B = self._mixed(torch.zeros(1, dtype=torch.long, device=self.logits.device))
        finally:
            self.training = training
        return B[0].T, A[0].T


class PolyConfig(TargetConfig):
    """Poly's settings.

    r: rank. n_tasks: how many tasks there are. n_skills: how many LoRAs they share. n_splits: parts of the inputs and
    outputs with weights of their own. init_weights=False starts at random.
    """

    peft_type: ClassVar[str] = "POLY"
    trains: ClassVar[str] = "several A and B, and each task's weights of them"
    relative_rate: ClassVar[float] = 4.0
    when: ClassVar[str] = "Several related tasks at once, of which it shall be learned what they share."
    evidence: ClassVar[str] = (
        "Ponti et al. report it ahead of one adapter for all tasks and of one for each, in multitask learning and with "
        "few examples of a new task, and that the skills can be interpreted. Page-Caccia et al. find that the parts "
        "of multi-head routing help more. Every call needs task_ids where there are several tasks, and with several "
        "it cannot be merged."
    )
    hf_prefix: ClassVar[str] = "poly_"
    not_in_hf: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})

    r: int = Field(default=8, ge=1)
    n_tasks: int = Field(default=1, ge=1)
    n_skills: int = Field(default=4, ge=1)
    n_splits: int = Field(default=1, ge=1)
    poly_type: Literal["poly"] = "poly"
    init_weights: bool = True

    @property
    def acts_on_rows(self) -> bool:
        return self.n_tasks > 1

    def fits(self, module: nn.Module) -> bool:
        return is_linear(module)

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        if self.n_tasks == 1:
            return made
        ids = TaskIds(self.n_tasks)
        for adapter in made.values():
            if isinstance(adapter, PolyAdapter):
                adapter.ids = (ids,)
        if takes(model, "decoder_input_ids"):
            made[reader(model)[0]] = TaskIds(self.n_tasks, ids)
        return made | {"": ids}

    def build(self, name: str, site: nn.Module) -> PolyAdapter:
        shape = weights.layout(site)
        assert shape is not None
        if (both := math.gcd(shape.out, shape.into)) % self.n_splits:
            raise ConfigError(
                f"{name} has {shape.into} inputs and {shape.out} outputs, which n_splits={self.n_splits} does not "
                f"divide. Closest: {closest_divisor(self.n_splits, both)}."
            )
        return PolyAdapter(site, self.r, self.n_tasks, self.n_skills, self.n_splits, self.init_weights)
