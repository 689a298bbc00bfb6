"""Lily (Zhong et al. 2024, arXiv 2407.09946): y = W x + b + s sum_e p_e B_e^T A x, p = softmax(R A x).

Layers of one kind (one entry of target_modules, one shape) share num_B experts B_e (r, out), each stride_A of them in a
row share A (r, in), and each has a router R (num_B, r) of its own. p is a mean over the tokens of a row, as many as one
call has: padding counts, and with a cache every new token is routed by itself. HF PEFT takes the mean over the whole
batch, so that a row's result hangs on its neighbours; here a row gives what it gives alone. B starts at zero, so that
nothing changes at first.
"""

import math
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from .. import weights
from ..adapter import Adapter
from ..targets import TargetConfig, is_linear, matches
from .delta import shape_of


class Matrix(nn.Module):
    """One object for all sites that share it."""

    def __init__(self, site: nn.Module, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = weights.new_parameter(site, rows, columns)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))


class LilyAdapter(Adapter):
    not_merged: ClassVar[str] = "its router looks at the input"
    takes_means = True
    shares: tuple[str, int]  # the kind of its layer, and stride_A

    def __init__(self, site: nn.Module, config: "LilyConfig") -> None:
        """B holds the experts one below the other, (num_B r, out)."""
        super().__init__()
        out, into = shape_of(site)
        r, experts, self.scale = config.r, config.num_B, config.scaling
        self.rank = r, min(out, into)
        self.A, self.B = Matrix(site, r, into), Matrix(site, experts * r, out)
        self.router = Matrix(site, experts, r)
        if config.init_weights:  # else no identity: for tests, and for those who load weights anyway
            nn.init.zeros_(self.B.weight)

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = F.linear(x, self.A.weight.to(x))  # (B, ..., r); a shared one may lie on another device
        p = F.linear(h, self.router.weight.to(x.dtype)).softmax(-1)
        if tokens := tuple(range(1, x.dim() - 1)):
            p = p.mean(tokens, keepdim=True)
        routed = (p[..., None] * h[..., None, :]).flatten(-2)  # (B, ..., num_B r)
        return y + (routed @ self.B.weight.to(x) * self.scale).to(y.dtype)

    def hf_key(self, name: str) -> str:
        return f"lily_{name}"


class LilyConfig(TargetConfig):
    """Lily's settings.

    r: rank. stride_A: how many layers in a row share one A. num_B: how many experts all layers share, at least 2.
    scaling: s. init_weights=False starts at random.
    """

    peft_type: ClassVar[str] = "LILY"
    trains: ClassVar[str] = "low-rank A and B, shared by layers"
    when: ClassVar[str] = "Higher ranks than LoRA's from as many parameters, where merging is not needed."
    evidence: ClassVar[str] = (
        "Zhong et al. report better results than LoRA with as many or fewer parameters on language, vision and "
        "multimodal tasks. It cannot be merged. The router's mean is over whole sequences: while a causal model trains "
        "it includes tokens that generation has not written yet."
    )
    hf_prefix: ClassVar[str] = "lily_"

    r: int = Field(default=32, ge=1)
    stride_A: int = Field(default=1, ge=1)  # noqa: N815 - HF PEFT's name
    num_B: int = Field(default=2, ge=2)  # noqa: N815
    scaling: float = 1.0
    init_weights: bool = True

    def fits(self, module: nn.Module) -> bool:
        return is_linear(module)

    def build(self, name: str, site: nn.Module) -> LilyAdapter:
        return LilyAdapter(site, self)

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        kinds: dict[tuple[str, int, int], list[LilyAdapter]] = {}
        for name, adapter in made.items():
            if isinstance(adapter, LilyAdapter):
                kind = self._entry(name), adapter.A.weight.shape[1], adapter.B.weight.shape[1]
                kinds.setdefault(kind, []).append(adapter)
        for (entry, *_), alike in kinds.items():
            for place, adapter in enumerate(alike):
                adapter.shares = entry, self.stride_A
                adapter.A, adapter.B = alike[place - place % self.stride_A].A, alike[0].B
        return made

    def _entry(self, name: str) -> str:
        """The entry of target_modules that means this module, the longest of several; or the regular expression."""
        entries = self.target_modules
        return max((e for e in entries if matches(e, name)), key=len) if isinstance(entries, list) else str(entries)
