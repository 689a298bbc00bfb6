"""UniPELT (Mao et al. 2022, arXiv 2110.07577): a prefix, LoRA and adapters, each behind a learned gate.

    y = f(x) + g (y' - f(x)),    g = sigmoid(mean over tokens of (w x + b))

for LoRA's and the adapters' y', and g times the prefix's keys and values; every site and layer has gates of its own.
"""

from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from ..adapter import Adapter, PeftConfig
from ..targets import SavedModulesConfig
from .bottleneck import BottleneckConfig
from .lora import LoraConfig
from .prefix_tuning import PrefixTuningConfig
from .union import UnionConfig


class UniPeltConfig(SavedModulesConfig):
    """UniPELT's settings. Attached it is a gated UnionConfig of the three methods.

    num_virtual_tokens: of the prefix. r, lora_alpha: of LoRA at query and value. reduction_factor: of the Pfeiffer
    adapters. Defaults are the paper's.
    """

    peft_type: ClassVar[str] = "UNIPELT"
    trains: ClassVar[str] = "a prefix, LoRA's pairs, bottlenecks, and gates for each"
    when: ClassVar[str] = "Few rows, and no time to find out which single method suits them."
    evidence: ClassVar[str] = (
        "Mao et al. report 1 to 4 % more than the best of its parts on GLUE with BERT where rows are few, and at least "
        "as much where they are many. It is slower than each part, and the gates keep it from being merged."
    )

    num_virtual_tokens: int = Field(default=10, ge=1)
    r: int = Field(default=8, ge=1)
    lora_alpha: int | float = 8
    reduction_factor: float = Field(default=16, ge=1)

    def union(self) -> UnionConfig:
        shared: dict[str, Any] = self.model_dump(include=set(SavedModulesConfig.model_fields))
        prefix: dict[str, Any] = {"num_virtual_tokens": self.num_virtual_tokens}
        lora: dict[str, Any] = {"r": self.r, "lora_alpha": self.lora_alpha}
        pfeiffer: dict[str, Any] = {"reduction_factor": self.reduction_factor}
        methods: list[PeftConfig] = [PrefixTuningConfig(**prefix), LoraConfig(**lora), BottleneckConfig(**pfeiffer)]
        return UnionConfig(methods=methods, gated=True, **shared)

    def resolved(self, model: nn.Module) -> UnionConfig:  # type: ignore[override]
        return self.union().resolved(model)

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        return self.resolved(model).adapters(model)
