"""Full fine-tuning (Devlin et al. 2019, arXiv 1810.04805): y = f'(x). To compare with.

f' is a copy of the module, trained whole, at every module that has values of its own. The base stays as it is, so that
an adapter of this kind is saved, switched, merged and removed as any other. Its file is as large as the model, and
while it trains the memory holds the model once more than usual: five times with AdamW, not four. Weights that are tied
stay tied while they train.
"""

from typing import ClassVar

from torch import nn

from .. import weights
from ..adapter import Adapter, TrainedCopy
from ..errors import TargetError
from ..sites import plain_copy
from ..targets import TargetConfig, base_modules, compact


class FullConfig(TargetConfig):
    """Full fine-tuning's settings: which modules. None means all that have values to train."""

    peft_type: ClassVar[str] = "FULL"
    trains: ClassVar[str] = "every weight"
    when: ClassVar[str] = "The measure of other methods; a model much smaller than its data."
    evidence: ClassVar[str] = (
        "The other methods' papers compare with it; most come close to it, and some report more where data are few. "
        "Biderman et al. (2024, arXiv 2405.09673) find that it learns more than LoRA from much new material, code and "
        "mathematics, and forgets more."
    )
    relative_rate: ClassVar[float] = 0.05
    hf_prefix: ClassVar[str] = "full_"

    def default_targets(self, model: nn.Module) -> list[str]:
        found: list[str] = []
        for name, module in base_modules(model):
            inside = found and name.startswith(f"{found[-1]}.")
            if not inside and next(module.parameters(recurse=False), None) is not None:
                found.append(name)
        if not found or next(model.parameters(recurse=False), None) is not None:
            raise TargetError(
                f"{type(model).__name__} has values outside of its modules, or none: name target_modules."
            )
        return compact(found, model)

    def fits(self, module: nn.Module) -> bool:
        return not isinstance(module, nn.MultiheadAttention) and next(module.parameters(), None) is not None

    def build(self, name: str, site: nn.Module) -> TrainedCopy:
        if any(weights.is_quantized(part) for part in site.modules()):
            raise TargetError(f"{name} is quantized, and cannot be trained whole. Load the model without, or use LoRA.")
        return TrainedCopy(plain_copy(site), "full_layers.")

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        modules = dict(model.named_modules())
        first: dict[nn.Parameter, nn.Parameter] = {}
        for path, adapter in made.items():
            for name, copied in list(adapter.named_parameters()):
                owner, _, entry = name.rpartition(".")
                base = modules[path].get_submodule(owner.removeprefix("replacement").removeprefix("."))
                value = base._parameters[entry]
                assert value is not None
                setattr(adapter.get_submodule(owner), entry, first.setdefault(value, copied))
        return made
