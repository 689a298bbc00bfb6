"""A union: several methods as one adapter, which is trained, saved, switched and removed as one.

Where two of them act at one site they nest in their order. With gates (UniPELT, Mao et al. 2022, arXiv 2110.07577)
each method at each site says by its input how much it acts there:

    y = f(x) + g (y' - f(x)),    g = sigmoid(mean over tokens of (w x + b))

with y' what the method alone would give; of a prefix g scales its keys and values.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, SerializeAsAny, field_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import weights
from ..adapter import Adapter, InputAdapter, PeftConfig, Union
from ..errors import ConfigError, TargetError
from ..targets import SavedModulesConfig
from .prefix_tuning import Prefix


class Gate(nn.Module):
    """sigmoid(mean over tokens of (w x + b)), x (B, ..., width) -> (B, 1, ..., 1)."""

    def __init__(self, site: nn.Module, width: int) -> None:
        super().__init__()
        self.weight = weights.new_parameter(site, 1, width)
        self.bias = weights.new_parameter(site, 1)
        if not self.weight.is_meta:
            fresh = nn.Linear(width, 1)
            self.load_state_dict(fresh.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        opened = torch.sigmoid(nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)))
        tokens = tuple(range(1, x.dim()))
        return opened.mean(tokens, keepdim=True) if tokens else opened


class Gated(Adapter):
    not_merged: ClassVar[str] = "its gate depends on the input"
    takes_means = True

    def __init__(self, name: str, site: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        kind, shape = type(adapter), weights.layout(site)
        if kind.before is not Adapter.before or shape is None or shape.kernel or isinstance(site, nn.Embedding):
            raise TargetError(
                f"{name}: {kind.__name__} at a {type(site).__name__} takes no gate: that needs features as input and a "
                "change of the output. Leave it out, or set gated=False."
            )
        self.adapter, self.gate = adapter, Gate(site, shape.into)

    def after(self, site: nn.Module, x: Any, y: Any) -> Any:
        changed = self.adapter.after(site, x, y)
        return y + self.gate(x).to(y.dtype) * (changed - y)

    def hf_key(self, name: str) -> str:
        own = name.removeprefix("adapter.")
        return name if own == name else self.adapter.hf_key(own)

    def expect(self, keys: Any) -> None:
        self.adapter.expect(keys)


class UnionConfig(SavedModulesConfig):
    """A union's settings.

    methods: the configs, in the order in which they act. gated: a learned gate for each method at each site.
    modules_to_save: modules trained whole beside them.
    """

    peft_type: ClassVar[str] = "UNION"
    found_in_training: ClassVar[frozenset[str]] = frozenset({"methods"})

    methods: list[SerializeAsAny[PeftConfig]] = Field(min_length=1)
    gated: bool = False

    @field_validator("methods", mode="before")
    @classmethod
    def _from_dicts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [PeftConfig.from_dict(part) if isinstance(part, dict) else part for part in value]

    @property
    def acts_on_rows(self) -> bool:
        return self.gated  # by the mean over a row

    @property
    def is_final(self) -> bool:
        return all(method.is_final for method in self.methods)

    def union_of(self) -> list[PeftConfig]:
        return list(self.methods)

    def to_save(self) -> "UnionConfig":
        return self.model_copy(update={"methods": [method.to_save() for method in self.methods]})

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "methods": [method.to_dict() for method in self.methods]}

    def resolved(self, model: nn.Module) -> Self:
        config = super().resolved(model)
        parts = []
        for method in self.methods:
            given = {"task_type": self.task_type, "modules_to_save": config.modules_to_save}
            known = {name: value for name, value in given.items() if name in type(method).model_fields and value}
            if own := getattr(method, "modules_to_save", None):
                known["modules_to_save"] = list(dict.fromkeys([*own, *(config.modules_to_save or [])]))
            parts.append(method.model_copy(update=known).resolved(model))
        return config.model_copy(update={"methods": parts})

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        modules = dict(model.named_modules())
        copies = self.trained_copies(model)
        found: dict[str, dict[int, Adapter]] = {}
        for number, method in enumerate(self.methods):
            for path, adapter in method.adapters(model).items():
                if adapter.replacement is not None and path in copies:
                    continue
                if self.gated and adapter.replacement is None:
                    adapter = self._gated(path, modules[path], adapter)
                found.setdefault(path, {})[number] = adapter
        self._check(found, copies)
        return {**{path: Union(parts) for path, parts in found.items()}, **copies}

    def _gated(self, path: str, site: nn.Module, adapter: Adapter) -> Adapter:
        if not isinstance(adapter, InputAdapter):
            return Gated(path, site, adapter)
        if isinstance(adapter, Prefix):
            if not adapter.enters_attention:
                raise TargetError(f"{type(site).__name__}: a prefix takes no gate where not every attention is known.")
            width = site.config.get_text_config(decoder=True).hidden_size  # type: ignore[union-attr, operator]
            adapter.gates = nn.ModuleList(Gate(site, width) for _ in range(adapter.layers))
        elif adapter.alone:
            raise ConfigError(f"{type(adapter).__name__} takes no gate: of prompts only prefix tuning does.")
        return adapter

    def _check(self, found: Mapping[str, Mapping[int, Adapter]], copies: Mapping[str, Adapter]) -> None:
        alone = {
            number
            for parts in found.values()
            for number, part in parts.items()
            if isinstance(part, InputAdapter) and part.alone
        }
        if len(alone) > 1:
            names = " and ".join(self.methods[number].peft_type for number in sorted(alone))
            raise ConfigError(f"{names} both put virtual tokens before the input: a union takes one of them.")
        for path, parts in found.items():
            replaced = [part for part in parts.values() if part.replacement is not None]
            if len(replaced) > 1 or path in copies:
                names = " and ".join(self.methods[number].peft_type for number in parts)
                raise TargetError(f"{path} is trained whole, and {names} would adapt it too. Leave it out of one.")

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        terms = [method.penalty(own) for method, own in self._own(adapters)]
        found = [term for term in terms if term is not None]
        return sum(found[1:], found[0]) if found else None

    def stepped(self, adapters: Mapping[str, Adapter], optimizer: Optimizer) -> None:
        for method, own in self._own(adapters):
            method.stepped(own, optimizer)

    def _own(self, adapters: Mapping[str, Adapter]) -> list[tuple[PeftConfig, dict[str, Adapter]]]:
        return [
            (method, {path: part for path, adapter in adapters.items() if (part := _part(adapter, number)) is not None})
            for number, method in enumerate(self.methods)
        ]

    def packed(self, path: str, entry: str, value: Tensor) -> Tensor:
        method, own = self._method(entry)
        return method.packed(path, own, value) if method else value

    def unpacked(self, path: str, entry: str, value: Tensor, into: Tensor) -> Tensor:
        method, own = self._method(entry)
        return method.unpacked(path, own, value, into) if method else value

    def _method(self, entry: str) -> tuple[PeftConfig | None, str]:
        """by_method.1.A as the second method and A; an entry of a copy as it is."""
        if not entry.startswith("by_method."):
            return None, entry
        _, number, own = entry.split(".", 2)
        return self.methods[int(number)], own.removeprefix("adapter.")


def _part(adapter: Adapter, number: int) -> Adapter | None:
    if not isinstance(adapter, Union) or str(number) not in adapter.by_method:
        return None
    part = adapter.by_method[str(number)]
    return part.adapter if isinstance(part, Gated) else part  # type: ignore[return-value]
