"""Which modules a config means: names, patterns, "all-linear", defaults; and what a model offers at all."""

import inspect
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Self, TypeVar

from pydantic import field_validator
from torch import nn

from . import weights
from .adapter import HEADS, Adapter, PeftConfig, TrainedCopy
from .errors import ConfigError, TargetError, closest, did_you_mean, warn
from .sites import AnySite, plain_copy

T = TypeVar("T")

ALL_LINEAR = "all-linear"

# Names under which attention's query and value projections (or the one fused projection) go; the first group
# that a model has whole is what target_modules=None means, as in the LoRA paper (section 7.1).
ATTENTION = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q", "v"),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("to_q", "to_v"),
    ("query_key_value",),
    ("qkv_proj",),
    ("c_attn",),
    ("Wqkv",),
    ("qkv",),
    ("in_proj",),
)


class PartialTargetWarning(UserWarning):
    """Targets are less than they may seem: entries of a list that match nothing, or experts beside "all-linear"."""


def base_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without the root and without the insides of adapters."""
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module._modules.items():
            if child is None or id(child) in seen or (name == "adapters" and isinstance(module, AnySite)):
                continue
            seen.add(id(child))
            yield f"{path}{name}", child
            yield from walk(child, f"{path}{name}.")

    return walk(model, prefix)


def adaptable(model: nn.Module) -> dict[str, weights.Layout]:
    """Every layer that adapters fit on, with the shape of its weight."""
    shapes = ((name, weights.layout(module)) for name, module in base_modules(model))
    return {name: shape for name, shape in shapes if shape is not None}


def expert_parameters(model: nn.Module) -> list[str]:
    """The parameters that hold matrices of several experts, one behind the other; they are no layers."""
    return [
        f"{path}.{name}"
        for path, module in base_modules(model)
        for name, value in module._parameters.items()
        if "expert" in f"{path}.{type(module).__name__}".lower()
        if value is not None and value.dim() == 3 and len(value) > 1
    ]


def is_linear(module: nn.Module) -> bool:
    others = (nn.Embedding, nn.MultiheadAttention, *weights.CONVOLUTIONS)
    return weights.layout(module) is not None and not isinstance(module, others)


def takes(module: nn.Module, argument: str) -> bool:
    """Whether the module's forward has an argument of that name."""
    return argument in inspect.signature(module.forward).parameters


def matches(pattern: str, name: str) -> bool:
    """Whether an entry of a list means this module: its full name, or its last parts."""
    return name == pattern or name.endswith(f".{pattern}")


def means(entries: list[str] | str, name: str) -> bool:
    """Whether a setting means this module: as a list of names, or as a regular expression for the full name."""
    if isinstance(entries, str):
        return re.fullmatch(entries, name) is not None
    return any(matches(entry, name) for entry in entries)


class SavedModulesConfig(PeftConfig):
    """Settings of the methods beside which whole modules can be trained.

    modules_to_save: modules trained whole, as copies; for classification tasks the head is added by itself.
    """

    modules_to_save: list[str] | None = None

    @field_validator("modules_to_save", mode="before")
    @classmethod
    def _saved_listed(cls, value: Any) -> Any:
        return sorted(value) if isinstance(value, set | frozenset) else value

    def resolved(self, model: nn.Module) -> Self:
        return self.model_copy(update={"modules_to_save": self._to_save(model)})

    def trained_copies(self, model: nn.Module) -> dict[str, Adapter]:
        """Adapters for `modules_to_save`, by module name."""
        made: dict[str, Adapter] = {}
        for name, module in self._saved(dict(base_modules(model)), model).items():
            if isinstance(module, nn.MultiheadAttention):
                raise TargetError(f"modules_to_save: {name} is a MultiheadAttention; adapt it, or save its parent.")
            made[name] = TrainedCopy(plain_copy(module))
        return made

    def _saved(self, modules: dict[str, nn.Module], model: nn.Module) -> dict[str, nn.Module]:
        if not self.modules_to_save:
            return {}
        # HF PEFT's rule is looser here: all names with this ending, so "norm" also means input_layernorm.
        names = select(self.modules_to_save, modules, "modules_to_save", model, lambda end, name: name.endswith(end))
        outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
        return {name: modules[name] for name in outer}

    def _to_save(self, model: nn.Module) -> list[str] | None:
        heads = HEADS.get(self.task_type, ()) if self.task_type else ()
        names = [name for name, _ in base_modules(model)]
        present = [head for head in heads if any(matches(head, name) for name in names)]
        listed = list(dict.fromkeys([*(self.modules_to_save or []), *present]))
        return listed or None


class TargetConfig(SavedModulesConfig):
    """Settings of the methods that live at sites chosen by name.

    target_modules: list of names (full, or last parts), a regular expression for full names, or "all-linear";
        None takes the query and value projections of attention.
    exclude_modules: names or a regular expression to leave out.
    layers_to_transform, layers_pattern: only the layers with these numbers, in the module list of that name.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    @field_validator("target_modules", "exclude_modules", "layers_pattern", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return sorted(value) if isinstance(value, set | frozenset) else value

    @abstractmethod
    def build(self, name: str, site: nn.Module) -> Adapter:
        """A new adapter for the module of this name."""

    def resolved(self, model: nn.Module) -> Self:
        """The same config with everything that was left to the model written out, so that it can be saved."""
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern says where layers are counted: it needs layers_to_transform beside it.")
        if self.layers_to_transform is not None and self._is_expression():
            raise ConfigError("target_modules is a regular expression: write the layers into it, not beside it.")
        config = super().resolved(model)
        if self.target_modules is None:
            config = config.model_copy(update={"target_modules": self.default_targets(model)})
        elif self.target_modules == ALL_LINEAR:
            found = compact(self._all_linear(model, config.modules_to_save or []), model)
            config = config.model_copy(update={"target_modules": found})
        return config

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules to adapt, by name.

        Raises:
            TargetError: a setting that matches nothing, or a match that is no layer with a weight.
        """
        assert self.target_modules is not None, "resolve the config first"
        modules = dict(base_modules(model))
        found = _with_projections(select(self.target_modules, modules, "target_modules", model), modules)
        saved = list(self._saved(modules, model))
        found = [name for name in found if not any(name == top or name.startswith(f"{top}.") for top in saved)]
        if self.exclude_modules:
            excluded = select(self.exclude_modules, modules, "exclude_modules", model)
            found = [name for name in found if name not in excluded]
        found = self.in_layers(found)
        if not found:
            raise TargetError("After exclude_modules and modules_to_save no target is left; loosen one of them.")
        for name in found:
            if not self.fits(modules[name]):
                raise TargetError(
                    f"{name} is a {type(modules[name]).__name__}, which {type(self).__name__} cannot adapt. "
                    f"Name its layers instead.{did_you_mean(name, (n for n, m in modules.items() if self.fits(m)))}"
                )
        return {name: modules[name] for name in found}

    def default_targets(self, model: nn.Module) -> list[str]:
        """What target_modules=None means; unless a method says otherwise, attention's query and value."""
        return list(_default(model))

    def fits(self, module: nn.Module) -> bool:
        """Whether this method can adapt such a module; by default every layer with one weight."""
        return weights.layout(module) is not None

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        found = self.find(model)
        made = {name: self.build(pattern_name(name, found), site) for name, site in found.items()}
        return made | self.trained_copies(model)

    def _is_expression(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR

    def _all_linear(self, model: nn.Module, saved: list[str]) -> list[str]:
        """Every linear layer but the output head: logits are left to what comes before them, as in QLoRA."""
        get_output = getattr(model, "get_output_embeddings", None)
        try:
            head = get_output() if get_output else None
        except NotImplementedError:
            head = None
        found = [name for name, module in base_modules(model) if is_linear(module) and module is not head]
        found = [name for name in found if not any(f".{entry}." in f".{name}." for entry in saved)]
        if not found:
            raise TargetError(f"{type(model).__name__} has no linear layer for target_modules='{ALL_LINEAR}'.")
        if (experts := expert_parameters(model)) and not getattr(self, "target_parameters", None):
            ends = sorted({name.rpartition(".")[2] for name in experts})
            warn(
                f"Experts of {type(model).__name__} are parameters, no layers: '{ALL_LINEAR}' leaves out {experts[0]} "
                f"and its like. LoRA reaches them with target_parameters={ends}.",
                PartialTargetWarning,
            )
        return found

    def in_layers(self, found: list[str]) -> list[str]:
        """Of these names those in `layers_to_transform`, or all where that is not set."""
        if self.layers_to_transform is None:
            return found
        wanted = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        counted = rf"(?:^|.*?\.)(?:{'|'.join(patterns)})\.(\d+)\." if patterns else r"(?:.*?\.)?[^.]*\.(\d+)\."
        number = {name: int(hit[1]) for name in found if (hit := re.match(counted, name))}
        if not number:
            raise TargetError(
                f"layers_pattern={self.layers_pattern!r} matches none of the targets, for example {found[0]}."
            )
        if missing := sorted(set(wanted) - set(number.values())):
            there = sorted(set(number.values()))
            raise TargetError(f"layers_to_transform names layers {missing}; the targets are in layers {there}.")
        return [name for name in found if number.get(name) in wanted]


class FanConfig(TargetConfig):
    """fan_in_fan_out: whether layers store their weight (in, out), as GPT-2's do; set by itself, the layers tell."""

    fan_in_fan_out: bool = False

    def resolved(self, model: nn.Module) -> Self:
        config = super().resolved(model)
        fan = any(weights.is_gpt2_conv1d(site) for site in config.find(model).values())
        return config.model_copy(update={"fan_in_fan_out": fan})


def shared(made: dict[str, Adapter]) -> dict[str, Adapter]:
    """One adapter, the first, for all sites whose names differ in numbers only and whose adapters have its shapes."""
    first: dict[Any, Adapter] = {}
    found = {}
    for path, adapter in made.items():
        shapes = tuple((name, value.shape) for name, value in adapter.named_parameters())
        kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", path)  # whole parts of the name
        found[path] = adapter if adapter.replacement is not None else first.setdefault((kind, shapes), adapter)
    return found


def check_patterns(setting: str, keys: Iterable[str], names: Iterable[str]) -> None:
    """Raise a ConfigError if a key of rank_pattern or the like means none of these modules."""
    names = list(names)
    for key in keys:
        if not any(pattern_matches(key, name) for name in names):
            raise ConfigError(f"{setting} has the key {key!r}, which matches no target.{did_you_mean(key, names)}")


def pattern_name(name: str, targets: Collection[str]) -> str:
    """The name that patterns go by. As in HF PEFT, an attention's settings are those of its output projection."""
    parent, _, last = name.rpartition(".")
    return parent if last == "out_proj" and parent in targets else name


def pattern_matches(key: str, name: str) -> bool:
    """HF PEFT's rule: the key is a regular expression for the whole name or for its last parts."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def pattern_value(pattern: dict[str, T], name: str, default: T) -> T:
    """The value of the first key that means this module."""
    return next((value for key, value in pattern.items() if pattern_matches(key, name)), default)


def _with_projections(found: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """As in HF PEFT, nn.MultiheadAttention as a target means its output projection as well."""
    parts = {name: (name, f"{name}.out_proj") for name in found if isinstance(modules[name], nn.MultiheadAttention)}
    return list(dict.fromkeys(part for name in found for part in parts.get(name, (name,))))


def select(
    wanted: list[str] | str,
    named: Mapping[str, nn.Module | None],
    setting: str,
    model: nn.Module,
    alike: Callable[[str, str], bool] = matches,
    what: str = "module",
) -> list[str]:
    """The names a setting means, in the model's order.

    Args:
        named: all that there are, of modules with the module, which says whether to offer it to who mistypes.
        what: they are names of.
    """
    if isinstance(wanted, str):
        try:
            found = [name for name in named if means(wanted, name)]
        except re.error as error:
            raise ConfigError(f"{setting}={wanted!r} is no regular expression: {error}.") from None
        unmatched = [] if found else [wanted]
    else:
        found = [name for name in named if any(alike(entry, name) for entry in wanted)]
        unmatched = [entry for entry in wanted if not any(alike(entry, name) for name in found)]
    hints = list(dict.fromkeys(hint for entry in unmatched for hint in _suggest(entry, named)))
    offer = f" Closest: {', '.join(hints)}." if hints else ""
    if not found:
        raise TargetError(
            f"{setting}={wanted!r} matches no {what} of {type(model).__name__}.{offer} "
            "The command `trimtab targets MODEL` lists what there is."
        )
    if unmatched:
        warn(f"{setting}: {unmatched} match no {what} of {type(model).__name__}.{offer}", PartialTargetWarning)
    return found


def _suggest(entry: str, named: Mapping[str, nn.Module | None]) -> list[str]:
    offered = (name for name, module in named.items() if module is None or weights.layout(module))
    ends = dict.fromkeys(name.rsplit(".", 1)[-1] for name in offered)
    return closest(entry.rsplit(".", 1)[-1], (end for end in ends if not end.isdigit()))


def _default(model: nn.Module) -> tuple[str, ...]:
    ends = {name.rsplit(".", 1)[-1] for name, module in base_modules(model) if is_linear(module)}
    for group in ATTENTION:
        if ends.issuperset(group):
            return group
    raise TargetError(
        f"target_modules=None means attention's query and value, which {type(model).__name__} has under no known "
        f"name. Give target_modules, or '{ALL_LINEAR}'."
    )


def compact(names: list[str], model: nn.Module) -> list[str]:
    """The last parts of the names where they say the same, else the names."""
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    meant = [name for name, _ in base_modules(model) if means(ends, name)]
    return ends if meant == names and not any(end.isdigit() for end in ends) else names
