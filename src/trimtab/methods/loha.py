"""LoHa (Hyeon-Woo et al. 2021, FedPara, arXiv 2108.06098): y = W x + b + s ((A1 B1) * (A2 B2)) x, * elementwise.

Each A (out, r), each B (r, in * kernel); the product of two matrices of rank r reaches rank r^2. s = alpha / r. B2
starts at zero, so that nothing changes at first. With use_effective_conv2d each of the two matrices is a core
(r, r, *kernel) between a (r, out) and b (r, in).
"""

import math
from typing import ClassVar

from torch import Tensor, nn

from .. import weights
from .delta import DeltaAdapter, DeltaConfig, core_shape, shape_of, with_core


class LoHaAdapter(DeltaAdapter):
    hf_names: ClassVar[dict[str, str]] = {
        "A1": "hada_w1_a", "B1": "hada_w1_b", "A2": "hada_w2_a", "B2": "hada_w2_b", "T1": "hada_t1", "T2": "hada_t2"
    }  # fmt: skip

    def __init__(
        self, site: nn.Module, r: int, scale: float, init: bool, core: bool, rank_dropout: float, module_dropout: float
    ) -> None:
        super().__init__(rank_dropout, module_dropout, rescale=True)
        out, into, *kernel = shape_of(site)
        self.scale = scale
        flat = into * math.prod(kernel)
        self.rank = r, min(out, flat)
        self.A1, self.A2 = (weights.new_parameter(site, *((r, out) if core else (out, r))) for _ in range(2))
        self.B1, self.B2 = (weights.new_parameter(site, r, into if core else flat) for _ in range(2))
        self.T1 = self.T2 = None
        if core:
            self.T1, self.T2 = (weights.new_parameter(site, *core_shape(r, tuple(kernel))) for _ in range(2))
        for parameter in self.parameters():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        if init:  # else no identity: for tests, and for those who load weights anyway
            nn.init.zeros_(self.B2)

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        if self.T1 is None or self.T2 is None:
            both = (self.A1 @ self.B1) * (self.A2 @ self.B2)
        else:
            both = with_core(self.T1, self.A1, self.B1) * with_core(self.T2, self.A2, self.B2)
        return both.view(shape) * self.scale


class LoHaConfig(DeltaConfig):
    """LoHa's settings; those of DeltaConfig, and init_weights: False starts at random."""

    peft_type: ClassVar[str] = "LOHA"
    trains: ClassVar[str] = "two low-rank pairs, multiplied"
    relative_rate: ClassVar[float] = 4.0
    when: ClassVar[str] = (
        "Changes of a rank higher than LoRA's from as many parameters; image models, where LyCORIS made it known."
    )
    evidence: ClassVar[str] = (
        "Hyeon-Woo et al. reach the accuracy of the whole model with 3 to 10 times less communication in federated "
        "learning, training from scratch. Yeh et al. (LyCORIS, 2023) bring it to Stable Diffusion and compare it with "
        "LoRA and LoKr there. It builds a matrix as large as the weight in every step, which costs time and memory."
    )
    hf_prefix: ClassVar[str] = "hada_"

    init_weights: bool = True

    def build(self, name: str, site: nn.Module) -> LoHaAdapter:
        kernel = shape_of(site)[2:]
        core = self.use_effective_conv2d and math.prod(kernel) > 1
        return LoHaAdapter(
            site, self.rank(name), self.scale(name), self.init_weights, core, self.rank_dropout, self.module_dropout
        )
