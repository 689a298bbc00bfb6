"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): y = W x + s P (e * (Q x)), and the ranks find their places.

P (out, r), e (r,) and Q (r, in) are kept near a singular value decomposition by the penalty

    R = mean over all P and Q of |P^T P - I| and |Q Q^T - I|                                (of eq. 4)

times orth_reg_weight, added to the loss. After every step of the optimizer each weight w is scored,

    I = |w dL/dw|    I' = beta1 I' + (1 - beta1) I    U' = beta2 U' + (1 - beta2) |I - I'|   (eq. 8-10)
    S_i = s(e_i) + mean_j s(P_ji) + mean_j s(Q_ij)    with s(w) = I' U'                      (eq. 7, 11)

and every deltaT steps the singular values e_i that are not among the b(t) best of the whole model are set to zero:

    b(t) = b1 + (b0 - b1) (1 - (t - tinit) / (total_step - tinit - tfinal))^3                (eq. 12)

from b0 = init_r per site until tinit to b1 = target_r per site, tfinal steps before the end. From there on the choice
is final: it is `rank_pattern`, and only what it keeps is saved. As in the authors' code, R is a mean of norms where
eq. 4 sums squares, t starts at tinit, and scores take the weights after the step. I', U' and t lie in the optimizer's
state, so a resumed run goes on with them.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .. import weights
from ..adapter import Adapter
from ..errors import ConfigError, did_you_mean
from ..targets import FanConfig
from .lora import LoraConfig

KEPT_DIM = {"P": 1, "E": 0, "Q": 0}  # along which a parameter's triplets lie


class AdaLoraAdapter(Adapter):
    hf_names: ClassVar[dict[str, str]] = {"P": "lora_B", "E": "lora_E", "Q": "lora_A"}

    def __init__(self, site: nn.Module, r: int, scale: float, dropout: float, init: bool) -> None:
        super().__init__()
        shape = weights.layout(site)
        assert shape is not None
        self.scale, self.dropout = scale, dropout
        self.into = (shape.into, *shape.kernel)
        self.P = weights.new_parameter(site, shape.out, r)
        self.E = weights.new_parameter(site, r, 1)
        self.Q = weights.new_parameter(site, r, math.prod(self.into))
        self.rank = r, min(len(self.P), self.Q.shape[1])
        for vectors in (self.P, self.Q):
            nn.init.normal_(vectors, std=0.02)
        if init:
            nn.init.zeros_(self.E)
        else:  # no identity: for tests, and for those who load weights anyway
            nn.init.normal_(self.E)

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        Q = (self.E * self.Q).to(x.dtype).view(-1, *self.into)
        h = weights.linear(site, x, Q) * self.scale
        return y + weights.mix(site, h, self.P.to(x.dtype)).to(y.dtype)

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        B, A = self.low_rank(site)
        return weight + (B @ A).view(weight.shape).to(weight.dtype)

    def low_rank(self, site: nn.Module) -> tuple[Tensor, Tensor]:
        return self.P * self.scale, self.E * self.Q


class AdaLoraConfig(FanConfig):
    """AdaLoRA's settings; the steps are steps of the optimizer.

    init_r, target_r: rank of every site at first, and on average in the end. total_step: steps of the whole training,
    which a recipe leaves out. In `trimtab train` no checkpoint of before the final choice counts as the best.
    tinit, tfinal: steps at the start and at the end in which ranks stay. deltaT: steps between two choices.
    beta1, beta2: smoothing of sensitivity and uncertainty. orth_reg_weight: of the penalty R. lora_alpha:
    s = lora_alpha / init_r. lora_dropout: on x. init_lora_weights: False starts at random. rank_pattern: which
    triplets are kept, found by training. fan_in_fan_out is set by itself.
    """

    peft_type: ClassVar[str] = "ADALORA"
    trains: ClassVar[str] = "a pruned singular value decomposition"
    relative_rate: ClassVar[float] = 8.0
    when: ClassVar[str] = "A tight budget, a number of steps that is known ahead, and time to set up a schedule."
    evidence: ClassVar[str] = (
        "The paper reports gains over LoRA of the same size on GLUE and SQuAD, most at the lowest budgets. It trains "
        "more than it keeps (init_r against target_r), keeps scores as large as the adapter, and has three more "
        "settings to get right."
    )
    hf_prefix: ClassVar[str] = "lora_"
    hf_only: ClassVar[dict[str, Any]] = {  # HF PEFT's class has all of LoRA's settings
        **LoraConfig.hf_only, **{name: field.default for name, field in LoraConfig.model_fields.items()}
    }  # fmt: skip
    example: ClassVar[dict[str, Any]] = {"total_step": 1000}
    counts_steps: ClassVar[str] = "total_step"
    compares_layers: ClassVar[bool] = True
    found_in_training: ClassVar[frozenset[str]] = frozenset({"rank_pattern"})

    target_r: int = Field(default=8, ge=1)
    init_r: int = Field(default=12, ge=1)
    tinit: int = Field(default=0, ge=0)
    tfinal: int = Field(default=0, ge=0)
    deltaT: int = Field(default=1, ge=1)  # noqa: N815 - HF PEFT's name
    beta1: float = Field(default=0.85, gt=0, lt=1)
    beta2: float = Field(default=0.85, gt=0, lt=1)
    orth_reg_weight: float = Field(default=0.5, ge=0)
    total_step: int | None = Field(default=None, ge=1)
    lora_alpha: int | float = Field(default=8, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    init_lora_weights: bool = True
    rank_pattern: dict[str, list[bool]] | None = None

    @model_validator(mode="after")
    def _schedule(self) -> Self:
        if self.total_step is None:
            raise ValueError("total_step is needed: the number of optimizer steps of the whole training")
        if self.tinit + self.tfinal >= self.total_step:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of total_step={self.total_step} steps to "
                f"choose ranks in. Closest: total_step={self.tinit + self.tfinal + 1}"
            )
        if self.target_r > self.init_r:
            raise ValueError(f"ranks are taken away, so target_r is init_r={self.init_r} at most, not {self.target_r}")
        return self

    @property
    def is_final(self) -> bool:
        return self.rank_pattern is not None

    def fits(self, module: nn.Module) -> bool:
        shape = weights.layout(module)
        return shape is not None and shape.groups == 1 and not isinstance(module, nn.Embedding)

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        known = [_key(path) for path in made]
        for key in self.rank_pattern or ():
            if key not in known:
                raise ConfigError(f"rank_pattern has the key {key!r}, which is no target.{did_you_mean(key, known)}")
        return made

    def build(self, name: str, site: nn.Module) -> AdaLoraAdapter:
        kept = self._kept(name)
        if kept is not None and len(kept) != self.init_r:
            raise ConfigError(f"rank_pattern says of {len(kept)} triplets of {name} which to keep; init_r makes "
                              f"{self.init_r}.")  # fmt: skip
        r = self.init_r if kept is None else sum(kept)
        return AdaLoraAdapter(site, r, self.lora_alpha / self.init_r, self.lora_dropout, self.init_lora_weights)

    def packed(self, path: str, entry: str, value: Tensor) -> Tensor:
        """Without the triplets that the final choice took away."""
        kept = self._kept(path)
        if kept is None or entry not in KEPT_DIM or value.shape[KEPT_DIM[entry]] != len(kept):
            return value
        return value.index_select(KEPT_DIM[entry], _places(kept, value))

    def unpacked(self, path: str, entry: str, value: Tensor, into: Tensor) -> Tensor:
        """Back in their places among those of an adapter that still has all."""
        kept = self._kept(path)
        if kept is None or entry not in KEPT_DIM or value.shape == into.shape:
            return value
        if into.shape[KEPT_DIM[entry]] != len(kept) or value.shape[KEPT_DIM[entry]] != sum(kept):
            return value  # the caller tells that the shapes differ
        return torch.zeros_like(into).index_copy_(KEPT_DIM[entry], _places(kept, into), value.to(into))

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        """orth_reg_weight times R."""
        own = _own(adapters)
        if not self.orth_reg_weight or not own:
            return None
        left = [self.packed(path, "P", adapter.P).T for path, adapter in own.items()]
        right = [self.packed(path, "Q", adapter.Q) for path, adapter in own.items()]
        grams = [vectors @ vectors.T for vectors in (*left, *right)]
        device = grams[0].device  # sites may lie on several
        off = [torch.linalg.norm(gram - torch.eye(len(gram)).to(gram)).to(device) for gram in grams]
        return self.orth_reg_weight * torch.stack(off).mean()

    def stepped(self, adapters: Mapping[str, Adapter], optimizer: Optimizer) -> None:
        own = _own(adapters)
        if not own:
            return
        first = optimizer.state[next(iter(own.values())).E]
        first["adalora_step"] = t = first.get("adalora_step", 0) + 1
        if self.rank_pattern is not None:
            self._forget_pruned(own)
        else:
            for adapter in own.values():
                for parameter in (adapter.P, adapter.E, adapter.Q):
                    self._score(parameter, optimizer.state[parameter])
            assert self.total_step is not None
            final = t >= self.total_step - self.tfinal
            if final or (t > self.tinit and t % self.deltaT == 0):
                scores = {path: _triplets(adapter, optimizer) for path, adapter in own.items()}
                kept = self._best(scores, self.budget(t, len(own)))
                for path, row in kept.items():
                    own[path].E.masked_fill_(~row.to(own[path].E.device)[:, None], 0.0)
                if final:
                    self.rank_pattern = {_key(path): row.tolist() for path, row in kept.items()}
                    self._forget_pruned(own)

    def budget(self, t: int, sites: int) -> int:
        """b(t): how many singular values of the whole model are kept at step t."""
        assert self.total_step is not None
        left = 1 - (t - self.tinit) / (self.total_step - self.tinit - self.tfinal)
        share = min(max(left, 0.0), 1.0) ** 3
        return int(sites * (self.target_r + (self.init_r - self.target_r) * share))

    def _score(self, parameter: Tensor, state: dict[str, Any]) -> None:
        if "adalora_sensitivity" not in state:
            state["adalora_sensitivity"] = torch.zeros_like(parameter)
            state["adalora_uncertainty"] = torch.zeros_like(parameter)
        smooth, uncertain = state["adalora_sensitivity"], state["adalora_uncertainty"]
        now = torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).abs()
        smooth.mul_(self.beta1).add_(now, alpha=1 - self.beta1)
        uncertain.mul_(self.beta2).add_((now - smooth).abs(), alpha=1 - self.beta2)

    def _best(self, scores: dict[str, Tensor], budget: int) -> dict[str, Tensor]:
        """Which of the triplets are among the `budget` best of all."""
        order = torch.cat([score.cpu() for score in scores.values()]).argsort(descending=True, stable=True)
        kept = torch.zeros(len(order), dtype=torch.bool)
        kept[order[:budget]] = True
        return dict(zip(scores, torch.split(kept, [len(score) for score in scores.values()]), strict=True))

    def _forget_pruned(self, adapters: Mapping[str, AdaLoraAdapter]) -> None:
        """Keep at zero what the final choice took away: the run goes on as one resumed from the saved file does."""
        for path, adapter in adapters.items():
            for entry, parameter in adapter.named_parameters():
                parameter.copy_(self.unpacked(path, entry, self.packed(path, entry, parameter), parameter))

    def _kept(self, path: str) -> list[bool] | None:
        return (self.rank_pattern or {}).get(_key(path))


def _key(path: str) -> str:
    return f"{path}.lora_E"  # HF PEFT's name of what the pattern is about


def _own(adapters: Mapping[str, Adapter]) -> dict[str, AdaLoraAdapter]:
    return {path: adapter for path, adapter in adapters.items() if isinstance(adapter, AdaLoraAdapter)}


def _triplets(adapter: AdaLoraAdapter, optimizer: Optimizer) -> Tensor:
    """S (r,), of the smoothed scores."""
    P, E, Q = (
        optimizer.state[parameter]["adalora_sensitivity"] * optimizer.state[parameter]["adalora_uncertainty"]
        for parameter in (adapter.P, adapter.E, adapter.Q)
    )
    total: Tensor = E[:, 0] + P.mean(0) + Q.mean(1)
    return total


def _places(kept: list[bool], like: Tensor) -> Tensor:
    return torch.tensor(kept, device=like.device).nonzero()[:, 0]
