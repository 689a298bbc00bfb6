"""LoReFT (Wu et al. 2024, arXiv 2404.03592): h' = h + R^T (W h + b - R h), at some positions of some layers' outputs.

R (r, n) has orthonormal rows, made by a QR decomposition of the trained matrix; W (r, n) and b (r,) are free. The
positions are the first f and the last l of the prompt, padding not counted; the two share their R, W, b if tied. What
is generated after the prompt is left alone, which takes a KV cache to tell: without one the last positions move along.
Unlike in the paper's code W starts as R and b at zero, so that nothing changes at first.
"""

import re
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from .. import weights
from ..adapter import Adapter, InputAdapter
from ..errors import ConfigError, TargetError
from ..targets import TargetConfig
from .bottleneck import parts, width


class Prompt(InputAdapter):
    """At the root of the model: what a call says of its positions. Trains nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None  # (B, T), 1 where there is a token; kept for recomputing in the backward pass
        self.past = 0  # positions in the cache

    def inputs(self, site: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        mask, past = given.get("attention_mask"), given.get("past_key_values")
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.past = 0 if past is None else int(past.get_seq_length())
        return given


class Edit(nn.Module):
    """R^T (W h + b - R h)."""

    def __init__(self, site: nn.Module, r: int, n: int) -> None:
        super().__init__()
        self.R = weights.new_parameter(site, r, n)
        self.W = weights.new_parameter(site, r, n)
        self.b = weights.new_parameter(site, r)
        nn.init.orthogonal_(self.R)
        with torch.no_grad():
            self.W.copy_(self.rotation())
        nn.init.zeros_(self.b)

    def rotation(self) -> Tensor:
        """R (r, n) with orthonormal rows: the trained matrix itself where its rows are that already."""
        Q, triangle = torch.linalg.qr(self.R.to(weights.master_dtype(self.R.dtype)).T)
        rows: Tensor = (Q * triangle.diagonal().sign()).T
        return rows

    def forward(self, h: Tensor) -> Tensor:
        R = self.rotation()
        inner = F.linear(h, (self.W - R).to(h.dtype), self.b.to(h.dtype))
        return F.linear(inner, R.T.to(h.dtype))


class LoReftAdapter(Adapter):
    not_merged: ClassVar[str] = "it acts at some positions only"

    prompt: Prompt  # one for all sites: LoReftConfig.adapters puts it in

    def __init__(self, site: nn.Module, n: int, config: "LoReftConfig") -> None:
        super().__init__()
        self.first, self.last = config.first, config.last
        self.edit = Edit(site, config.r, n)
        both = self.first and self.last and not config.tied
        self.last_edit = Edit(site, config.r, n) if both else None

    def after(self, site: nn.Module, x: Any, y: Any) -> Any:
        if isinstance(y, tuple):  # some layers return more than their hidden states
            return (self.after(site, x, y[0]), *y[1:])
        if self.prompt.past:
            return y
        batch, length = y.shape[:2]
        mask = self.prompt.mask
        real = torch.ones(batch, length, dtype=torch.bool, device=y.device) if mask is None else mask.to(y.device) != 0
        place = real.cumsum(1)  # of each token among the row's real ones, from 1
        first = real & (place <= self.first)
        last = real & (place > place[:, -1:] - self.last)
        edited = y + self.edit(y)
        if self.last_edit is None:
            return torch.where((first | last)[..., None], edited, y)
        y = torch.where((last & ~first)[..., None], y + self.last_edit(y), y)
        return torch.where(first[..., None], edited, y)

    def hf_key(self, name: str) -> str:
        return f"reft_{name}"


class LoReftConfig(TargetConfig):
    """LoReFT's settings.

    r: rank. first, last: how many positions at the start and at the end of the prompt are edited. tied: both with the
    same R, W and b. layers: numbers of the layers whose output is edited, None all. target_modules: modules whose
    output (B, T, n) is edited instead.
    """

    peft_type: ClassVar[str] = "LOREFT"
    trains: ClassVar[str] = "low-rank edits of hidden states"
    relative_rate: ClassVar[float] = 4.0
    when: ClassVar[str] = "Very few parameters, and prompts whose first and last positions tell the task."
    evidence: ClassVar[str] = (
        "The paper uses 15 to 65 times fewer parameters than LoRA. It acts on the prompt only, so it costs nothing "
        "for each generated token, but it cannot be merged and needs the KV cache in generation."
    )
    hf_prefix: ClassVar[str] = "reft_"

    r: int = Field(default=4, ge=1)
    first: int = Field(default=4, ge=0)
    last: int = Field(default=4, ge=0)
    tied: bool = True
    layers: list[int] | None = None

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if not self.first and not self.last:
            raise ValueError("first=0 and last=0 leave no position to edit. Closest: last=1")
        return self

    @property
    def acts_on_rows(self) -> bool:
        return True

    def default_targets(self, model: nn.Module) -> list[str]:
        found = [re.match(r"(?:.*?\.)??\d+(?=\.)", part) for part in parts(model)]
        blocks = list(dict.fromkeys(hit[0] for hit in found if hit))
        blocks = [block for block in blocks if not _decodes(model, block)]
        if not blocks:
            raise TargetError(f"{type(model).__name__} has no numbered layers. Give target_modules.")
        there = {int(block.rpartition(".")[2]) for block in blocks}
        if missing := sorted(set(self.layers or ()) - there):
            raise ConfigError(f"layers names {missing}; the model has layers {sorted(there)}.")
        return [block for block in blocks if self.layers is None or int(block.rpartition(".")[2]) in self.layers]

    def fits(self, module: nn.Module) -> bool:
        return not isinstance(module, weights.CONVOLUTIONS) and width(module) is not None

    def build(self, name: str, site: nn.Module) -> LoReftAdapter:
        n = width(site)
        assert n is not None
        if self.r > n:
            raise ConfigError(f"{name} is {n} wide: r={self.r} orthonormal rows do not fit. Closest: {n}.")
        return LoReftAdapter(site, n, self)

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        prompt = Prompt()
        for path, adapter in made.items():
            if _decodes(model, path):
                raise TargetError(f"{path} is in a decoder, whose positions are not those of the prompt. Target the "
                                  "encoder's layers.")  # fmt: skip
            if isinstance(adapter, LoReftAdapter):
                adapter.prompt = prompt
        return {"": prompt, **made}


def _decodes(model: nn.Module, path: str) -> bool:
    """Whether the module is in the decoder of an encoder-decoder model."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and "decoder" in path.split(".")
