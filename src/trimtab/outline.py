"""A model's outline: its layers without their weights, and names that repeat from layer to layer as one line."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .adapter import HEADS
from .targets import adaptable, is_linear
from .tasks.models import loading


def outline(model: str) -> Any:
    """The model of this folder or hub id on the meta device: its config is read, no weights are.

    Raises:
        ConfigError: no such model.
    """
    import torch
    import transformers

    with loading(model), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(model)
        named = [getattr(transformers, name, None) for name in config.architectures or ()]
        if named and named[0] is not None:
            return named[0](config)
        return transformers.AutoModel.from_config(config)


def usual_ends(model: Any) -> list[str]:
    """The last parts of the names of the linear layers outside the head, or where there are none, of all layers."""
    heads = {"lm_head", *(head for names in HEADS.values() for head in names)}
    modules = dict(model.named_modules())
    layers = [name for name in adaptable(model) if heads.isdisjoint(name.split("."))]
    linear = [name for name in layers if is_linear(modules[name])]
    return sorted({name.rsplit(".", 1)[-1] for name in linear or layers})


@dataclass(frozen=True)
class Line:
    name: str  # encoder.layer.[0-5].attention.self.query
    what: str
    count: int


def fold(modules: Mapping[str, str]) -> list[Line]:
    """Module name -> what it is, with those that differ only in numbers, and are the same thing, as one line."""
    groups: dict[tuple[str, str], list[list[int]]] = {}
    for name, what in modules.items():
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "{}", name)  # only whole parts of the name
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        groups.setdefault((pattern, what), []).append(numbers)
    lines = []
    for (pattern, what), found in groups.items():
        places = [_ranges(sorted(set(values))) for values in zip(*found, strict=True)]
        lines.append(Line(pattern.format(*places), what, len(found)))
    return lines


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "[0-2,5]", and a single number as itself."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "[" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "]"
