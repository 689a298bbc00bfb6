"""RoAd (Liao and Monz 2024, arXiv 2409.00119): y = R (W x + b), R turns and stretches pairs of output features.

In each group of g = group_size features the first half is paired with the second. Of a pair (u, v) becomes

    u' = a cos(t) u - a sin(t) v,    v' = a sin(t) u + a cos(t) v

with an angle t and a length a for each pair (road_1), for each of u' and v' (road_2), or for each of the four terms
(road_4): out / 2, out or 2 out of both. t starts at zero and a at one, so that nothing changes at first.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from .. import weights
from ..adapter import Adapter
from ..errors import ConfigError, closest_divisor
from ..targets import TargetConfig, is_linear
from .delta import shape_of


class RoadAdapter(Adapter):
    hf_names: ClassVar[dict[str, str]] = {"theta": "road_theta", "alpha": "road_alpha"}

    def __init__(self, site: nn.Module, variant: str, group: int, init: bool) -> None:
        super().__init__()
        self.variant, self.group = variant, group
        numbers = {"road_1": 1, "road_2": 2, "road_4": 4}[variant] * shape_of(site)[0] // 2
        self.theta, self.alpha = (weights.new_parameter(site, numbers) for _ in range(2))
        if init:
            nn.init.zeros_(self.theta)
            nn.init.ones_(self.alpha)
        else:  # no identity: for tests, and for those who load weights anyway
            nn.init.normal_(self.theta, std=0.5)
            nn.init.normal_(self.alpha, mean=1, std=0.5)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """a cos(t) and a sin(t), each (groups, 1 or 2, g / 2): one for both halves, or one for each."""
        half = self.group // 2
        t, a = (value.to(weights.master_dtype(value.dtype)) for value in (self.theta, self.alpha))
        if self.variant != "road_4":
            numbers = 1 if self.variant == "road_1" else 2
            return (a * t.cos()).view(-1, numbers, half), (a * t.sin()).view(-1, numbers, half)
        (a_cos, a_sin), (t_cos, t_sin) = (value.view(-1, 2, 2, half).unbind(1) for value in (a, t))
        return a_cos * t_cos.cos(), a_sin * t_sin.sin()

    def _turned(self, values: Tensor) -> Tensor:
        """R values (..., out)."""
        cos, sin = (factor.to(values.dtype) for factor in self._factors())
        pairs = values.reshape(*values.shape[:-1], -1, 2, self.group // 2)
        u, v = pairs.unbind(-2)
        return (pairs * cos + torch.stack([-v, u], -2) * sin).flatten(-3)

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self._turned(y)

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        return self._turned(weight.T).T

    def merged_bias(self, site: nn.Module, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else self._turned(bias)


class RoadConfig(TargetConfig):
    """RoAd's settings.

    variant: "road_1", "road_2" or "road_4", how many numbers a pair has. group_size: even, and a divisor of the
    outputs; it says which features are pairs. init_weights=False starts at random.
    """

    peft_type: ClassVar[str] = "ROAD"
    trains: ClassVar[str] = "turns of pairs of features"
    relative_rate: ClassVar[float] = 8.0
    when: ClassVar[str] = (
        "Where IA3 is too weak: as small a file, and as cheap in batches whose rows have different adapters."
    )
    evidence: ClassVar[str] = (
        "Liao and Monz report the best results of the methods they compare on GLUE, and results near LoRA's or better "
        "on commonsense reasoning and arithmetic, with less than 0.1 % of the parameters. It can only mix the two "
        "features of a pair, and group_size must divide the outputs."
    )
    hf_prefix: ClassVar[str] = "road_"
    not_in_hf: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = Field(default=64, ge=2)
    init_weights: bool = True

    @field_validator("group_size")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"a group has two halves, so its size is even. Closest: {value - 1}")
        return value

    def fits(self, module: nn.Module) -> bool:
        return is_linear(module) or isinstance(module, nn.Embedding)

    def build(self, name: str, site: nn.Module) -> RoadAdapter:
        out = shape_of(site)[0]
        if out % 2:
            raise ConfigError(f"{name} has {out} outputs, which are not pairs. Leave it out with exclude_modules.")
        if out % self.group_size:
            raise ConfigError(f"{name} has {out} outputs, which group_size={self.group_size} does not divide. "
                              f"Closest: {2 * closest_divisor(self.group_size // 2, out // 2)}.")  # fmt: skip
        return RoadAdapter(site, self.variant, self.group_size, self.init_weights)
