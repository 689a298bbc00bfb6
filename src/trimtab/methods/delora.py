"""DeLoRA (Bini et al. 2025, arXiv 2503.18225): y = W x + b + l / r B' (A' (n * x)).

A' (r, in) and B' (out, r) are the trained A and B with rows and columns divided by their lengths; n (in,) holds the
lengths of the weight's columns as they were at the start, and is saved with the adapter. So the directions of the
change are learnt apart from its strength l, one trained number, which bounds it. B starts at zero: lengths below 1e-4
count as that.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import weights
from ..adapter import Adapter
from ..targets import check_patterns, pattern_value
from .delta import shape_of
from .pair import PairAdapter, PairConfig

SHORTEST = 1e-4


class DeloraAdapter(PairAdapter):
    hf_names: ClassVar[dict[str, str]] = {
        "A": "delora_A", "B": "delora_B", "strength": "delora_lambda", "norms": "delora_w_norm"
    }  # fmt: skip

    norms: Tensor

    def __init__(self, site: nn.Module, r: int, strength: float, dropout: float, init: bool) -> None:
        super().__init__()
        out, into = shape_of(site)
        self.rank, self.dropout = (r, min(out, into)), dropout
        self.A, self.B = weights.new_parameter(site, r, into), weights.new_parameter(site, out, r)
        self.strength = weights.new_parameter(site, 1)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if init:
            nn.init.zeros_(self.B)
        else:  # no identity: for tests, and for those who load weights anyway
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
        nn.init.constant_(self.strength, strength)
        self.register_buffer("norms", torch.empty_like(self.A[0], requires_grad=False))
        if not self.norms.is_meta:
            self.norms.copy_(weights.read(site).detach().norm(dim=0))

    def pair(self) -> tuple[Tensor, Tensor]:
        lengths = self.A.norm(dim=1).clamp(min=SHORTEST) * self.B.norm(dim=0).clamp(min=SHORTEST)
        return self.B * (self.strength / len(self.A) / lengths), self.A * self.norms


class DeloraConfig(PairConfig):
    """DeLoRA's settings.

    r: rank. delora_lambda: l at the start. module_dropout: probability, on the input of the change, in spite of its
    name. rank_pattern, lambda_pattern: other values for the modules a key (a regular expression for the end of the
    name) means. bias: which biases are trained as well, "none", "all" or those of the targets ("delora_only").
    init_weights=False starts at random.
    """

    peft_type: ClassVar[str] = "DELORA"
    trains: ClassVar[str] = "low-rank A and B, and their strength"
    relative_rate: ClassVar[float] = 0.0625
    when: ClassVar[str] = "Long training, or a learning rate that nobody searched for: the change has a bound."
    evidence: ClassVar[str] = (
        "Bini et al. report results like LoRA's or better on image generation, language understanding and instruction "
        "tuning, and far less harm from learning rates that are too high. The bound is one more thing to choose."
    )
    hf_prefix: ClassVar[str] = "delora_"

    r: int = Field(default=8, ge=1)
    delora_lambda: int | float = Field(default=15, gt=0)
    module_dropout: float = Field(default=0.0, ge=0, lt=1)
    bias: Literal["none", "all", "delora_only"] = "none"
    init_weights: bool = True
    rank_pattern: dict[str, int] = {}
    lambda_pattern: dict[str, int | float] = {}

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        targets = [name for name, adapter in made.items() if isinstance(adapter, DeloraAdapter)]
        check_patterns("rank_pattern", self.rank_pattern, targets)
        check_patterns("lambda_pattern", self.lambda_pattern, targets)
        return made

    def build(self, name: str, site: nn.Module) -> DeloraAdapter:
        r = pattern_value(self.rank_pattern, name, self.r)
        strength = pattern_value(self.lambda_pattern, name, self.delora_lambda)
        return self.biased(DeloraAdapter(site, r, strength, self.module_dropout, self.init_weights), site)
