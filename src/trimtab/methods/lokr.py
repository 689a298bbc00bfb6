"""LoKr (Edalati et al. 2022, KronA, arXiv 2212.10650; Yeh et al. 2023, LyCORIS, arXiv 2309.14859).

    y = W x + b + s (C1 (x) C2) x,    (x) the Kronecker product, s = alpha / r

With out = l k and in = m n, the pairs as close to square as decompose_factor lets them, C1 is (l, m) and C2
(k, n * kernel). C2 is a product A2 B2 of rank r where that is smaller, C1 with decompose_both, too; with
use_effective_conv2d C2 is a core (r, r, *kernel) between a (r, k) and b (r, n). C1 starts at zero, so that nothing
changes at first. A whole C2 of a Conv1d goes into the Kronecker product with its kernel as third side, as in HF
PEFT, which orders the entries of D differently from LyCORIS.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from .. import weights
from .delta import DeltaAdapter, DeltaConfig, core_shape, shape_of, with_core


class LoKrAdapter(DeltaAdapter):
    hf_names: ClassVar[dict[str, str]] = {
        "C1": "lokr_w1", "A1": "lokr_w1_a", "B1": "lokr_w1_b",
        "C2": "lokr_w2", "A2": "lokr_w2_a", "B2": "lokr_w2_b", "T2": "lokr_t2",
    }  # fmt: skip

    def __init__(self, name: str, site: nn.Module, config: "LoKrConfig") -> None:
        super().__init__(config.rank_dropout, config.module_dropout, config.rank_dropout_scale)
        out, into, *kernel = shape_of(site)
        r, self.scale = config.rank(name), config.scale(name)
        self.rank = r, min(out, into * math.prod(kernel))
        (l, k), (m, n) = (two_factors(size, config.decompose_factor) for size in (out, into))  # noqa: E741
        core = config.use_effective_conv2d and math.prod(kernel) > 1
        self.C1 = self.A1 = self.B1 = self.C2 = self.A2 = self.B2 = self.T2 = None
        if config.decompose_both and r < max(l, m) / 2:
            self.A1, self.B1 = weights.new_parameter(site, l, r), weights.new_parameter(site, r, m)
        else:
            self.C1 = weights.new_parameter(site, l, m)
        if r >= max(k, n) / 2:
            self.C2 = weights.new_parameter(site, k, n, *kernel)
        elif core:
            self.T2 = weights.new_parameter(site, *core_shape(r, tuple(kernel)))
            self.A2, self.B2 = weights.new_parameter(site, r, k), weights.new_parameter(site, r, n)
        else:
            self.A2 = weights.new_parameter(site, k, r)
            self.B2 = weights.new_parameter(site, r, n * math.prod(kernel))
        self._initialise(config.init_weights)

    def _initialise(self, init: bool | str) -> None:
        for parameter in self.parameters():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        if init is False:  # no identity: for tests, and for those who load weights anyway
            return
        first, second = self.C1 if self.C1 is not None else self.A1, self.C2 if self.C2 is not None else self.B2
        zero = second if init == "lycoris" else first
        assert zero is not None
        nn.init.zeros_(zero)

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        C1, C2 = self._first(), self._second()
        if self.C2 is None or len(shape) != 3:
            C2 = C2.flatten(1)
        return torch.kron(C1, C2).reshape(shape) * self.scale

    def _first(self) -> Tensor:
        if self.C1 is not None:
            return self.C1
        assert self.A1 is not None and self.B1 is not None
        return self.A1 @ self.B1

    def _second(self) -> Tensor:
        if self.C2 is not None:
            return self.C2
        assert self.A2 is not None and self.B2 is not None
        return self.A2 @ self.B2 if self.T2 is None else with_core(self.T2, self.A2, self.B2)


class LoKrConfig(DeltaConfig):
    """LoKr's settings; those of DeltaConfig, and:

    decompose_factor: the size wanted for one side of C1; -1 takes the divisors closest to the square root.
    decompose_both: make C1, too, a product of rank r. rank_dropout_scale: enlarge the rows that dropout leaves.
    init_weights: True (C1 zero), "lycoris" (C2 zero), or False (both random).
    """

    peft_type: ClassVar[str] = "LOKR"
    trains: ClassVar[str] = "factors of a Kronecker product"
    relative_rate: ClassVar[float] = 8.0
    when: ClassVar[str] = "Very small files at a rank that need not be low; image models as for LoHa."
    evidence: ClassVar[str] = (
        "Edalati et al. report better GLUE results with T5 than LoRA and adapters of their size give. A matrix as "
        "large as the weight is built in every step. How many parameters there are depends on how sizes divide, and a "
        "rank of half a factor's side or more means that this factor is whole."
    )
    hf_prefix: ClassVar[str] = "lokr_"

    decompose_both: bool = False
    decompose_factor: int = Field(default=-1, ge=-1)
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True

    @field_validator("decompose_factor")
    @classmethod
    def _no_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("no size has the divisor 0; use -1 for the divisors closest to the square root")
        return value

    def build(self, name: str, site: nn.Module) -> LoKrAdapter:
        return LoKrAdapter(name, site, self)


def two_factors(size: int, factor: int) -> tuple[int, int]:
    """Two divisors with product `size`: `factor` and its counterpart, else the closest to square below it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    largest = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    first = max(number for number in range(1, largest + 1) if size % number == 0)
    return first, size // first
