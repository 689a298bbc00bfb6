"""VB-LoRA (Li et al. 2024, arXiv 2405.15179): y = W x + b + B A x, both out of one bank.

The bank (h, v) of h vectors of length v is trained and shared by all sites. Each row of A (r, in) and each column of B
(out, r) is cut into parts of length v, and a part is a mean of k vectors of the bank: those of the k highest of its h
trained logits, weighted by their softmax. Bank and logits start at random, so that the change is small at first, but
not zero.
"""

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from .. import weights
from ..adapter import Adapter
from ..errors import ConfigError, closest_divisor
from ..targets import FanConfig
from .delta import shape_of
from .pair import PairAdapter, PairConfig, Shared


class VBLoRAAdapter(PairAdapter):
    hf_names: ClassVar[dict[str, str]] = {"logits_A": "vblora_logits_A", "logits_B": "vblora_logits_B"}
    hf_shared: ClassVar[dict[str, str]] = {"bank.values": "base_model.vblora_vector_bank"}

    bank: Shared  # VBLoRAConfig.adapters puts it in

    def __init__(self, site: nn.Module, config: "VBLoRAConfig") -> None:
        """logits_A (r, in / v, h), logits_B (out / v, r, h)."""
        super().__init__()
        out, into = shape_of(site)
        r, h, v = config.r, config.num_vectors, config.vector_length
        self.rank, self.topk, self.dropout = (r, min(out, into)), config.topk, config.vblora_dropout
        self.logits_A = weights.new_parameter(site, r, into // v, h)
        self.logits_B = weights.new_parameter(site, out // v, r, h)
        for logits in (self.logits_A, self.logits_B):
            nn.init.normal_(logits, std=config.init_logits_std)

    def _parts(self, logits: Tensor) -> Tensor:
        """(..., h) -> (..., v)."""
        highest, places = logits.topk(self.topk)
        return (highest.softmax(-1)[..., None] * self.bank.values.to(logits)[places]).sum(-2)

    def pair(self) -> tuple[Tensor, Tensor]:
        B = self._parts(self.logits_B).mT.flatten(0, 1)  # (out / v, v, r) -> (out, r)
        return B, self._parts(self.logits_A).flatten(1)


class VBLoRAConfig(PairConfig, FanConfig):
    """VB-LoRA's settings.

    r: rank. num_vectors, vector_length: h and v, which must divide inputs and outputs. topk: k. vblora_dropout:
    probability, on the input of the change. init_vector_bank_bound, init_logits_std: the bank starts uniformly between
    plus and minus this bound, logits with this deviation. bias: which biases are trained as well, "none", "all" or
    those of the targets ("vblora_only").
    """

    peft_type: ClassVar[str] = "VBLORA"
    trains: ClassVar[str] = "a bank of vectors, and whose mean each part is"
    relative_rate: ClassVar[float] = 4.0
    when: ClassVar[str] = "Few numbers for many or large layers, which share what they learn."
    evidence: ClassVar[str] = (
        "Li et al. report results like LoRA's or better on language understanding, generation and instruction tuning; "
        "with the k highest logits alone, a small part of the size on disk is enough to act. trimtab saves all logits, "
        "which training goes on from."
    )
    hf_prefix: ClassVar[str] = "vblora_"
    hf_only: ClassVar[dict[str, Any]] = {"save_only_topk_weights": False}
    example: ClassVar[dict[str, Any]] = {"vector_length": 64}

    r: int = Field(default=4, ge=1)
    num_vectors: int = Field(default=256, ge=1)
    vector_length: int = Field(default=256, ge=1)
    topk: int = Field(default=2, ge=1)
    vblora_dropout: float = Field(default=0.0, ge=0, lt=1)
    bias: Literal["none", "all", "vblora_only"] = "none"
    init_vector_bank_bound: float = Field(default=0.02, gt=0)
    init_logits_std: float = Field(default=0.1, ge=0)

    @model_validator(mode="after")
    def _enough_vectors(self) -> Self:
        if self.topk > self.num_vectors:
            raise ValueError(f"topk={self.topk} of num_vectors={self.num_vectors} there are not. "
                             f"Closest: {self.num_vectors}")  # fmt: skip
        return self

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        own = {name: adapter for name, adapter in made.items() if isinstance(adapter, VBLoRAAdapter)}
        first = model.get_submodule(next(iter(own)))
        bank = Shared(weights.new_parameter(first, self.num_vectors, self.vector_length))
        nn.init.uniform_(bank.values, -self.init_vector_bank_bound, self.init_vector_bank_bound)
        for adapter in own.values():
            adapter.bank = bank
        return made

    def build(self, name: str, site: nn.Module) -> VBLoRAAdapter:
        both = math.gcd(*shape_of(site))
        if both % self.vector_length:
            raise ConfigError(
                f"{name}: vector_length={self.vector_length} must divide its inputs and outputs, {shape_of(site)[1]} "
                f"and {shape_of(site)[0]}. Closest: {closest_divisor(self.vector_length, both)}."
            )
        return self.biased(VBLoRAAdapter(site, self), site)
