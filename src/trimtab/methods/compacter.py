"""Compacter (Mahabadi et al. 2021, arXiv 2106.04647): a bottleneck adapter of sums of Kronecker products.

    y' = y + U act(D y + d) + u,    D = sum_i A_i (x) (s_i t_i),   U likewise with s and t of its own

D (r, n) and U (n, r) are hypercomplex (PHM) layers: A (m, m, m) with m = phm_dim is one for all sites, both for D and
for U, and each site has s (m, r/m, phm_rank) and t (m, phm_rank, n/m). Adapters are after attention and after the
feed-forward part, or with plus_plus (Compacter++) after the latter only. t of U starts at zero, so that nothing
changes at first.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import weights
from ..adapter import Adapter
from ..errors import ConfigError, closest_divisor
from ..targets import TargetConfig
from .bottleneck import ends_of_parts, squeeze, width


class Rule(nn.Module):
    """A (m, m, m), one object that all adapters hold."""

    def __init__(self, site: nn.Module, m: int) -> None:
        super().__init__()
        self.A = weights.new_parameter(site, m, m, m)
        nn.init.normal_(self.A, std=m**-0.5)


class CompacterAdapter(Adapter):
    hf_names: ClassVar[dict[str, str]] = {
        name: f"compacter_{name}" for name in ("down_s", "down_t", "down_bias", "up_s", "up_t", "up_bias")
    }
    hf_shared: ClassVar[dict[str, str]] = {"rule.A": "base_model.compacter_A"}
    not_merged: ClassVar[str] = "a non-linearity lies between its two matrices"

    rule: Rule  # one for all sites: CompacterConfig.adapters puts it in

    def __init__(self, site: nn.Module, n: int, r: int, config: "CompacterConfig") -> None:
        super().__init__()
        m, k = config.phm_dim, config.phm_rank
        self.down_s = weights.new_parameter(site, m, r // m, k)
        self.down_t = weights.new_parameter(site, m, k, n // m)
        self.down_bias = weights.new_parameter(site, r)
        self.up_s = weights.new_parameter(site, m, n // m, k)
        self.up_t = weights.new_parameter(site, m, k, r // m)
        self.up_bias = weights.new_parameter(site, n)
        self.non_linearity = config.non_linearity
        for s in (self.down_s, self.up_s):
            nn.init.normal_(s)
        nn.init.normal_(self.down_t, std=0.01)
        for zero in (self.down_bias, self.up_t, self.up_bias):
            nn.init.zeros_(zero)

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        D, U = self._sum(self.down_s, self.down_t), self._sum(self.up_s, self.up_t)
        return y + squeeze(y, D, self.down_bias, U, self.up_bias, self.non_linearity)

    def _sum(self, s: Tensor, t: Tensor) -> Tensor:
        """sum_i A_i (x) (s_i t_i): (m * rows of s, m * columns of t)."""
        blocks = torch.einsum("iab,icd->acbd", self.rule.A, s @ t)
        return blocks.flatten(2).flatten(0, 1)


class CompacterConfig(TargetConfig):
    """Compacter's settings.

    phm_dim: m, which must divide the width n and r. phm_rank: rank of each s_i t_i. reduction_factor: r is n over
    that, rounded down to a multiple of m. plus_plus: no adapter after attention. target_modules: modules to put an
    adapter after instead.
    """

    peft_type: ClassVar[str] = "COMPACTER"
    trains: ClassVar[str] = "Kronecker factors of bottleneck adapters"
    relative_rate: ClassVar[float] = 2.0
    when: ClassVar[str] = "Bottleneck adapters for very small files."
    evidence: ClassVar[str] = (
        "Mahabadi et al. are on a par with full fine-tuning of T5 on GLUE with 0.047 % of its parameters. Widths must "
        "be multiples of phm_dim, and it cannot be merged."
    )
    hf_prefix: ClassVar[str] = "compacter_"
    example: ClassVar[dict[str, Any]] = {"reduction_factor": 16}

    phm_dim: int = Field(default=4, ge=1)
    phm_rank: int = Field(default=1, ge=1)
    reduction_factor: float = Field(default=32, ge=1)
    non_linearity: Literal["relu", "gelu", "silu", "tanh", "leaky_relu"] = "gelu"
    plus_plus: bool = False

    def default_targets(self, model: nn.Module) -> list[str]:
        return ends_of_parts(model, attention=not self.plus_plus)

    def fits(self, module: nn.Module) -> bool:
        return not isinstance(module, weights.CONVOLUTIONS) and width(module) is not None

    def build(self, name: str, site: nn.Module) -> CompacterAdapter:
        n, m = width(site), self.phm_dim
        assert n is not None
        if n % m:
            raise ConfigError(f"{name} is {n} wide, which phm_dim={m} does not divide. "
                              f"Closest: {closest_divisor(m, n)}.")  # fmt: skip
        r = int(n / self.reduction_factor) // m * m
        if r == 0:
            raise ConfigError(f"{name} is {n} wide: reduction_factor={self.reduction_factor:g} leaves fewer than the "
                              f"phm_dim={m} features that one block needs. Closest: {n // m}.")  # fmt: skip
        if self.phm_rank > (most := r // m):
            raise ConfigError(f"{name} has blocks of rank {most} at most: phm_rank={self.phm_rank} is too much. "
                              f"Closest: {most}.")  # fmt: skip
        return CompacterAdapter(site, n, r, self)

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        sites = {path: site for path, site in self.find(model).items() if isinstance(made[path], CompacterAdapter)}
        rule = Rule(next(iter(sites.values())), self.phm_dim)
        for path in sites:
            made[path].rule = rule
        return made
