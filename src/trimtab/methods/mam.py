"""Mix-and-match adapters (MAM; He et al. 2022, arXiv 2110.04366): a short prefix in attention, and parallel adapters.

    attention(Q, [P_k; K], [P_v; V]),    y = f(x) + s U act(D x) at the feed-forward part

with the prefix made by an MLP while training. A union of prefix tuning and parallel bottleneck adapters.
"""

from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from ..adapter import Adapter, PeftConfig
from ..targets import SavedModulesConfig
from .bottleneck import BottleneckConfig
from .prefix_tuning import PrefixTuningConfig
from .union import UnionConfig


class MamConfig(SavedModulesConfig):
    """MAM's settings. Attached it is a UnionConfig of the two methods.

    num_virtual_tokens: of the prefix, 30 in the paper. encoder_hidden_size: width of its MLP, 800 there.
    reduction_factor: of the adapters, whose width is that of the model divided by it. scaling: s, 4.
    """

    peft_type: ClassVar[str] = "MAM"
    trains: ClassVar[str] = "a prefix, and bottlenecks beside the feed-forward parts"
    relative_rate: ClassVar[float] = 0.25
    when: ClassVar[str] = "More trained parameters can be afforded than LoRA needs, for the most accuracy."
    evidence: ClassVar[str] = (
        "He et al. compare where and how methods act, and put the best together: on summarization (XSum) and "
        "translation it comes close to full fine-tuning with 6.7 % of its parameters, ahead of each part alone. The "
        "prefix takes room in the context, and nothing can be merged."
    )

    num_virtual_tokens: int = Field(default=30, ge=1)
    encoder_hidden_size: int = Field(default=800, ge=1)
    reduction_factor: float = Field(default=2, ge=1)
    scaling: float = 4.0

    def union(self) -> UnionConfig:
        shared: dict[str, Any] = self.model_dump(include=set(SavedModulesConfig.model_fields))
        prefix: dict[str, Any] = {"num_virtual_tokens": self.num_virtual_tokens, "prefix_projection": True}
        prefix["encoder_hidden_size"] = self.encoder_hidden_size
        parallel: dict[str, Any] = {"reduction_factor": self.reduction_factor, "scaling": self.scaling}
        methods: list[PeftConfig] = [PrefixTuningConfig(**prefix), BottleneckConfig(variant="parallel", **parallel)]
        return UnionConfig(methods=methods, **shared)

    def resolved(self, model: nn.Module) -> UnionConfig:  # type: ignore[override]
        return self.union().resolved(model)

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        return self.resolved(model).adapters(model)
