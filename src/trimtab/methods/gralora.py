"""GraLoRA (Jung et al. 2025, arXiv 2505.20355): y = W x + b + s D x, D of k x k blocks, each a product.

Block (j, n) of D, of output block j and input block n, is (A_nj B_jn)^T with A_nj (in / k, r / k) and B_jn
(r / k, out / k): as many numbers as LoRA of rank r has, for a rank of up to k r. With hybrid_r > 0 a plain LoRA pair of
that rank is added to D. s = alpha / (r + hybrid_r). B starts at zero, so that nothing changes at first.
"""

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from .. import weights
from ..errors import ConfigError, closest_divisor
from ..targets import FanConfig, is_linear
from .biased import BiasedAdapter, BiasedConfig
from .delta import shape_of


class GraloraAdapter(BiasedAdapter):
    hf_names: ClassVar[dict[str, str]] = {
        "A": "gralora_A", "B": "gralora_B",
        "general_A": "gralora_A_general.weight", "general_B": "gralora_B_general.weight",
    }  # fmt: skip

    def __init__(self, site: nn.Module, config: "GraloraConfig") -> None:
        """A (k, in / k, r), its last dimension (k, r / k) by output block; B (k, r, out / k), its second by input."""
        super().__init__()
        out, into = shape_of(site)
        r, k, hybrid = config.r, config.gralora_k, config.hybrid_r
        self.scale, self.dropout = config.alpha / (r + hybrid), config.gralora_dropout
        self.rank = max(r, hybrid), min(out, into)
        self.A = weights.new_parameter(site, k, into // k, r)
        self.B = weights.new_parameter(site, k, r, out // k)
        self.general_A = weights.new_parameter(site, hybrid, into) if hybrid else None
        self.general_B = weights.new_parameter(site, out, hybrid) if hybrid else None
        # All are sums over so many inputs; with init_weights=False no identity.
        for parameter, inputs in ((self.A, into // k), (self.B, r), (self.general_A, into), (self.general_B, hybrid)):
            if parameter is not None:
                nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)
        if config.init_weights:
            for parameter in (self.B, self.general_B):
                if parameter is not None:
                    nn.init.zeros_(parameter)

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        k, r = self.B.shape[:2]
        x = F.dropout(x, self.dropout, self.training)
        h = torch.einsum("...ni,nir->...nr", x.reshape(*x.shape[:-1], k, -1), self.A.to(x.dtype))
        h = h.reshape(*x.shape[:-1], k, k, r // k).transpose(-2, -3).flatten(-2)  # (..., output block, r)
        Dx = torch.einsum("...jr,jro->...jo", h, self.B.to(x.dtype)).flatten(-2)
        if self.general_A is not None and self.general_B is not None:
            Dx = Dx + F.linear(F.linear(x, self.general_A.to(x.dtype)), self.general_B.to(x.dtype))
        return self.with_bias(site, y + (Dx * self.scale).to(y.dtype))

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        B, A = self.low_rank(site)
        return weight + (B @ A).to(weight.dtype)

    def low_rank(self, site: nn.Module) -> tuple[Tensor, Tensor]:
        """Of rank k r: the rows of the second are (input block, output block, r / k)."""
        k, r = self.B.shape[:2]
        A: Tensor = torch.block_diag(*self.A.mT)  # type: ignore[no-untyped-call]
        blocks = self.B.view(k, k, r // k, -1)  # (output block, input block, r / k, out / k)
        B = torch.einsum("jnso,ji->jonis", blocks, torch.eye(k, dtype=A.dtype, device=A.device)).reshape(-1, k * r)
        if self.general_A is not None and self.general_B is not None:
            A, B = torch.cat([A, self.general_A]), torch.cat([B, self.general_B], 1)
        return B * self.scale, A


class GraloraConfig(BiasedConfig, FanConfig):
    """GraLoRA's settings.

    r: rank of all blocks of one row together. gralora_k: k, which must divide r and the inputs and outputs of all
    targets; the paper takes 2 up to rank 32 and 4 above. hybrid_r: rank of a plain LoRA beside. alpha:
    s = alpha / (r + hybrid_r). gralora_dropout: probability, on the input. bias: which biases are trained as well,
    "none", "all" or those of the targets ("gralora_only"). init_weights=False starts at random. fan_in_fan_out is set
    by itself.
    """

    peft_type: ClassVar[str] = "GRALORA"
    trains: ClassVar[str] = "low-rank A and B of each block"
    when: ClassVar[str] = "LoRA at high ranks, where it gains nothing more, with the same number of parameters."
    evidence: ClassVar[str] = (
        "Jung et al. report gains over LoRA on code generation and commonsense reasoning, up to 8.5 points on "
        "HumanEval+, the more the higher the rank. Low ranks leave little to each block; k must divide all widths."
    )
    hf_prefix: ClassVar[str] = "gralora_"
    not_in_hf: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    r: int = Field(default=32, ge=1)
    gralora_k: int = Field(default=2, ge=1)
    hybrid_r: int = Field(default=0, ge=0)
    alpha: int | float = 64
    gralora_dropout: float = Field(default=0.0, ge=0, lt=1)
    bias: Literal["none", "all", "gralora_only"] = "none"
    init_weights: bool = True

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.r % self.gralora_k:
            near = max(1, round(self.r / self.gralora_k)) * self.gralora_k
            raise ValueError(f"gralora_k={self.gralora_k} does not divide r={self.r}. Closest: r={near}")
        return self

    def fits(self, module: nn.Module) -> bool:
        return is_linear(module)

    def build(self, name: str, site: nn.Module) -> GraloraAdapter:
        (out, into), k = shape_of(site), self.gralora_k
        if out % k or into % k:
            raise ConfigError(f"{name} has {into} inputs and {out} outputs: gralora_k={k} does not divide both. "
                              f"Closest: {closest_divisor(k, into, out, self.r)}.")  # fmt: skip
        return self.biased(GraloraAdapter(site, self), site)
