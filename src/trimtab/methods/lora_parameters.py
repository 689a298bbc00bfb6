"""LoRA on parameters that are no layer's weight, such as the experts of a mixture, which are one tensor:

    W_e' = W_e + s B_e A_e,    W (E, out, in), or (E, in, out) where the module says `is_transposed`; a matrix has E = 1

A_e (r, in) and B_e (out, r) are one pair for each expert. They are kept as HF PEFT has them: A is (E r, in), expert
after expert, and B (out, r E), in which the expert is what changes fastest. The module finds W' in the place of W, so
each call computes W' as a whole, and dropout, which belongs to the input of A, cannot act.
"""

import math
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import weights
from ..adapter import Adapter
from ..errors import TargetError
from ..sites import ParameterSite
from ..targets import base_modules, select


class Pair(nn.Module):
    """A (E r, in) and B (out, r E) of one parameter."""

    def __init__(self, site: nn.Module, name: str, r: int, scale: float, init: bool | str) -> None:
        super().__init__()
        self.name, self.scale = name, scale
        self.turned = getattr(site, "is_transposed", False) and _stored(site, name).dim() == 3
        self.experts, out, into = self.seen(_stored(site, name)).shape
        self.rank = r, min(out, into)
        self.A = weights.new_parameter(site, self.experts * r, into)
        self.B = weights.new_parameter(site, out, r * self.experts)
        if init == "gaussian":
            nn.init.normal_(self.A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if init is False:  # no identity: for tests, and for those who load weights anyway
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.B)

    def seen(self, value: Tensor) -> Tensor:
        """The parameter as (E, out, in)."""
        value = value if value.dim() == 3 else value[None]
        return value.mT if self.turned else value

    def fold(self, value: Tensor) -> Tensor:
        A = self.A.view(self.experts, -1, self.A.shape[1]).to(value.dtype)  # (E, r, in)
        B = self.B.view(len(self.B), -1, self.experts).permute(2, 0, 1).to(value.dtype)  # (E, out, r)
        folded = torch.baddbmm(self.seen(value), B, A, alpha=self.scale)
        return (folded.mT if self.turned else folded).view(value.shape)


class ParametersAdapter(Adapter):
    """The pairs of all parameters of one module that are targets, in the module's own order."""

    not_merged: ClassVar[str] = "it changes parameters by name, which are no layer's weight"
    site = ParameterSite

    def __init__(self, pairs: list[Pair]) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(pairs)
        self.folds = tuple(pair.name for pair in pairs)
        self.hf_wraps = len(pairs)  # HF PEFT puts one around the other, the last one outermost
        highest = max(pairs, key=lambda pair: pair.rank[0] - pair.rank[1])
        self.rank, self.ranked = highest.rank, highest.name

    def folded(self, site: nn.Module, name: str, value: Tensor) -> Tensor:
        pair: Any = self.pairs[self.folds.index(name)]
        found: Tensor = pair.fold(value)
        return found

    def hf_key(self, name: str) -> str:
        _, number, letter = name.split(".")
        return "base_layer." * (len(self.folds) - 1 - int(number)) + f"lora_{letter}.weight"


def parameters(model: nn.Module, wanted: list[str]) -> list[str]:
    """The full names of the parameters that target_parameters means. Raises: TargetError, where it means none."""
    named = dict.fromkeys(f"{path}.{name}" for path, module in base_modules(model) for name in module._parameters)
    return select(wanted, named, "target_parameters", model, what="parameter")


def parameter_adapters(
    model: nn.Module,
    names: list[str],
    taken: Collection[str],
    rank_and_scale: Callable[[str], tuple[int, float]],
    init: bool | str,
) -> dict[str, Adapter]:
    """Adapters for parameters of these full names, by module name.

    Args:
        taken: modules that are adapted otherwise.
    Raises:
        TargetError: a parameter that this cannot act on.
    """
    found: dict[str, list[Pair]] = {}
    for full in names:
        path, _, name = full.rpartition(".")
        module = model.get_submodule(path)
        _check_parameter(full, module, name, path in taken)
        found.setdefault(path, []).append(Pair(module, name, *rank_and_scale(full), init))
    return {path: ParametersAdapter(pairs) for path, pairs in found.items()}


def _check_parameter(full: str, module: nn.Module, name: str, taken: bool) -> None:
    value = module._parameters[name]
    if taken:
        raise TargetError(f"{full}: its module is adapted or saved whole already. Leave it out of one of them.")
    if isinstance(module, nn.RNNBase):
        raise TargetError(f"{full}: a {type(module).__name__} does not look its parameters up by name.")
    if value is None or value.dim() not in (2, 3) or not value.is_floating_point() or value.itemsize < 2:
        what = "not there" if value is None else f"{tuple(value.shape)} of {value.dtype}"
        raise TargetError(f"{full} is {what}. LoRA's product is added to matrices of floating-point numbers.")


def _stored(site: nn.Module, name: str) -> Tensor:
    value = site._parameters[name]
    assert value is not None
    return value
