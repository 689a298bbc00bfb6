"""LayerNorm tuning (Zhao et al. 2023, arXiv 2312.11420): train the norms' own values. y = LN'(x).

LN' is a copy of the norm, so the base keeps its own. Any other module may be named too and is trained as a copy.
"""

from typing import ClassVar

from torch import nn

from ..adapter import TrainedCopy
from ..errors import TargetError
from ..sites import plain_copy
from ..targets import TargetConfig, base_modules, compact


class LNTuningConfig(TargetConfig):
    """LayerNorm tuning's settings: which modules. None means every norm with values to train."""

    peft_type: ClassVar[str] = "LN_TUNING"
    trains: ClassVar[str] = "the norms' own values"
    relative_rate: ClassVar[float] = 2.0
    when: ClassVar[str] = "Teaching a language model another kind of input; a tiny baseline beside others."
    evidence: ClassVar[str] = (
        "Zhao et al. turn language models into ones that see by it and report, at 13 billion parameters, over 20 % "
        "more than LoRA on average of five multi-modal tasks. Elsewhere it is a weak, cheap method: one factor, and "
        "at times one bias, per feature."
    )
    hf_prefix: ClassVar[str] = "ln_tuning_"
    not_in_hf: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})

    def default_targets(self, model: nn.Module) -> list[str]:
        norms = [name for name, module in base_modules(model) if is_norm(module)]
        if not norms:
            raise TargetError(f"target_modules=None means the norms, of which {type(model).__name__} has none.")
        return compact(norms, model)

    def fits(self, module: nn.Module) -> bool:
        return not isinstance(module, nn.MultiheadAttention) and next(module.parameters(), None) is not None

    def build(self, name: str, site: nn.Module) -> TrainedCopy:
        return TrainedCopy(plain_copy(site), "ln_tuning_layers.")


def is_norm(module: nn.Module) -> bool:
    """Every library writes its own RMSNorm; their names agree."""
    return "norm" in type(module).__name__.lower() and bool(list(module.parameters(recurse=False)))
