"""HiRA (Huang et al. 2025, ICLR, openreview.net/forum?id=TwJrTz9cRS): y = W x + b + (W * (B A)) x, * elementwise.

A (r, in, *kernel), B (out, r). B starts at zero, so that nothing changes at first (on embeddings A does). Times the
frozen W, a product of rank r is a change of a rank as high as W's and r allow, from LoRA's number of parameters. W is
the base's own, whatever other adapters add to it.
"""

import math
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from .. import weights
from ..adapter import Adapter
from ..targets import FanConfig, check_patterns, pattern_value
from .delta import shape_of


class HiRAAdapter(Adapter):
    def __init__(self, site: nn.Module, r: int, dropout: float, init: bool | str) -> None:
        super().__init__()
        out, *into = shape_of(site)
        self.embeds = isinstance(site, nn.Embedding)
        self.rank = r, min(out, math.prod(into))
        self.dropout = 0.0 if self.embeds else dropout  # of ids nothing can be dropped
        self.A = weights.new_parameter(site, r, *into)
        self.B = weights.new_parameter(site, out, r, *[1] * (len(into) - 1))
        if init is False:  # no identity: for tests, and for those who load weights anyway
            nn.init.normal_(self.A)
            nn.init.normal_(self.B)
        elif self.embeds:
            nn.init.zeros_(self.A)
            nn.init.normal_(self.B)
        else:
            nn.init.zeros_(self.B)
            if init == "gaussian":
                nn.init.normal_(self.A, std=1 / r)
            else:
                nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def _change(self, site: nn.Module) -> Tensor:
        """W * (B A), in the shape and the type of W."""
        W = weights.read(site)
        return W * (self.B.flatten(1) @ self.A.flatten(1)).view(W.shape).to(W.dtype)

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        own = y.dtype if self.embeds else x.dtype
        return y + weights.linear(site, x, self._change(site).to(own)).to(y.dtype)

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        return weight + self._change(site).to(weight.dtype)

    def hf_key(self, name: str) -> str:
        return f"hira_embedding_{name}" if self.embeds else f"hira_{name}"


class HiraConfig(FanConfig):
    """HiRA's settings.

    r: rank of B A. hira_dropout: probability, on the input of the change. rank_pattern: other ranks for the modules a
    key (a regular expression for the end of the name) means. init_weights: True (A as nn.Linear's default, B zero),
    "gaussian" (A normal with deviation 1 / r), or False (both random). fan_in_fan_out is set by itself.

    HF PEFT 0.21 writes rank_pattern down and does not heed it: adapters with one cannot go from there to here or back.
    """

    peft_type: ClassVar[str] = "HIRA"
    trains: ClassVar[str] = "a low-rank factor of each weight"
    relative_rate: ClassVar[float] = 4.0
    when: ClassVar[str] = "Much to learn with LoRA's number of parameters, where memory and time are not short."
    evidence: ClassVar[str] = (
        "Huang et al. report better results than LoRA and DoRA with as many parameters on commonsense reasoning, "
        "dialogue and mathematics. A matrix as large as the weight is built in every step, from the dequantized weight "
        "on a quantized base; and where the weight is zero nothing can change."
    )
    hf_prefix: ClassVar[str] = "hira_"

    r: int = Field(default=32, ge=1)
    hira_dropout: float = Field(default=0.0, ge=0, lt=1)
    init_weights: bool | Literal["gaussian"] = True
    rank_pattern: dict[str, int] = {}

    def fits(self, module: nn.Module) -> bool:
        return super().fits(module) and not isinstance(module, nn.MultiheadAttention)

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        check_patterns("rank_pattern", self.rank_pattern, (n for n, a in made.items() if isinstance(a, HiRAAdapter)))
        return made

    def build(self, name: str, site: nn.Module) -> HiRAAdapter:
        r = pattern_value(self.rank_pattern, name, self.r)
        return HiRAAdapter(site, r, self.hira_dropout, self.init_weights)
