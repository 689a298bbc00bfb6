"""Adapters of a model as a whole: attach, activate, disable, remove. Every change is checked before it is made."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from . import sites, weights
from .adapter import Adapter, InputAdapter, PeftConfig
from .errors import AdapterError, ConfigError, did_you_mean
from .sites import Active, AnySite
from .targets import compact


@dataclass
class Trunk:
    """What a model with adapters remembers; one object, kept at the root module."""

    active: Active = field(default_factory=Active)
    configs: dict[str, PeftConfig] = field(default_factory=dict)
    sites: dict[str, AnySite] = field(default_factory=dict)  # by module name
    trainable: set[str] = field(default_factory=set)  # base parameters that were trainable before
    repacking: list[str] = field(default_factory=list)  # modules whose weights were repacked for inference before
    counting: list[str] = field(default_factory=list)  # norms that counted running statistics before
    resting: tuple[str, ...] = ()  # what acted before `disable_adapters`

    def adapters(self, name: str) -> dict[str, Adapter]:
        """The adapters of one name, by module name."""
        there = ((path, sites.adapters(site)._modules) for path, site in self.sites.items())
        return {path: cast(Adapter, held[name]) for path, held in there if name in held}

    def stands_alone(self, name: str) -> bool:
        parts = [part for adapter in self.adapters(name).values() for part in adapter.parts()]
        return any(isinstance(part, InputAdapter) and part.alone for part in parts)


def trunk(model: nn.Module) -> Trunk:
    found = vars(model).get("_trunk")
    if not isinstance(found, Trunk):
        raise AdapterError(f"{type(model).__name__} has no adapters. Attach one with get_peft_model.")
    return found


@dataclass
class Plan:
    """An adapter that fits the model, not attached yet."""

    name: str
    config: PeftConfig
    adapters: dict[str, Adapter]


def plan(model: nn.Module, config: PeftConfig, name: str, saved: bool = False) -> Plan:
    """Build an adapter for this model and check that it would act. Changes nothing.

    Args:
        saved: it will be filled from a file, whose ranks may be higher than makes sense: HF PEFT lets them be.
    Raises:
        AdapterError: the name cannot be used, or is used already; merged weights, which are not the base's own.
        ConfigError, TargetError: the config means nothing in this model.
    """
    check_name(model, name)
    return Plan(name, *build(model, config, saved))


def build(model: nn.Module, config: PeftConfig, saved: bool = False) -> tuple[PeftConfig, dict[str, Adapter]]:
    """The resolved config and its adapters, as `plan` makes them."""
    if "_trunk" in vars(model):
        check_unmerged(trunk(model))
    sites.check_free("", model)
    config = config.resolved(model)
    adapters = config.adapters(model)
    modules = dict(model.named_modules())
    for path, adapter in adapters.items():
        for part in adapter.parts():
            sites.check(path, modules[path], modules[path.rpartition(".")[0]], part)
    if not saved:
        _check_ranks(model, config, adapters)
    return config, adapters


def _check_ranks(model: nn.Module, config: PeftConfig, adapters: dict[str, Adapter]) -> None:
    """Refuse parameters that could add nothing, since a matrix has at most the rank of its smaller side."""
    parts = [(path, part) for path, adapter in adapters.items() for part in adapter.parts()]
    ranks = [(f"{path}.{part.ranked}".strip("."), part.rank) for path, part in parts]
    above = {path: rank for path, rank in ranks if rank is not None and rank[0] > rank[1]}
    if not above:
        return
    path, (r, most) = min(above.items(), key=lambda item: item[1][1])
    known = type(config).model_fields.keys() - config.found_in_training
    names = compact(list(above), model)
    ways = [f"rank_pattern={dict.fromkeys(names, most)}"] if "rank_pattern" in known else []
    ways += [f"exclude_modules={names}"] if "exclude_modules" in known and above.keys() <= adapters.keys() else []
    others = f", or for these alone {' or '.join(ways)}" if ways else ""
    raise ConfigError(
        f"{path or type(model).__name__} has a rank of {most} at most: {r} is too much. Closest: {most}{others}."
    )


def check_name(model: nn.Module, name: str) -> None:
    there = vars(model).get("_trunk")
    if there and name in there.configs:
        raise AdapterError(f"There is an adapter {name!r} already. Delete it first, or choose another name.")
    if not name or "." in name or "/" in name:
        raise AdapterError(f"{name!r} cannot be an adapter's name: it names a folder and a module, so no '.' or '/'.")
    if hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"{name!r} cannot be an adapter's name: modules have something else of that name.")


def check_known(own: Trunk, names: Iterable[str]) -> None:
    """Raise an AdapterError where there is no adapter of one of these names."""
    for name in names:
        if name not in own.configs:
            raise AdapterError(f"There is no adapter {name!r}.{did_you_mean(name, own.configs)}")


def check_unmerged(own: Trunk) -> None:
    if own.active.merged:
        raise AdapterError(f"{list(own.active.merged)} are merged into the weights; call unmerge_adapter() first.")


def install(model: nn.Module, made: Plan) -> None:
    """Attach what `plan` built. The first adapter freezes the base."""
    if "_trunk" not in vars(model):
        own = Trunk(trainable={name for name, parameter in model.named_parameters() if parameter.requires_grad})
        own.repacking = [name for name, module in model.named_modules() if weights.stop_repacking(module)]
        own.counting = [name for name, module in model.named_modules() if sites.freeze_statistics(module)]
        model.requires_grad_(False)
        object.__setattr__(model, "_trunk", own)
    own = trunk(model)
    modules = dict(model.named_modules())
    for path, adapter in made.adapters.items():
        site = modules[path]
        follows = model if isinstance(site, sites.FrozenStatistics) else site
        adapter.requires_grad_(False).train(follows.training)
        own.sites[path] = sites.add(site, modules[path.rpartition(".")[0]], made.name, adapter, own.active)
    own.configs[made.name] = made.config


def activate(model: nn.Module, names: list[str], trainable: bool = True) -> None:
    """Let these adapters act, in this order, and train them (unless their config says inference_mode).

    Raises:
        AdapterError: an unknown name; two adapters that replace the same module, or that change the model's input;
            or merged adapters, which would go on acting unseen.
    """
    own = trunk(model)
    check_known(own, names)
    if set(names) != set(own.active.names):
        check_unmerged(own)
    if len(chosen := tuple(dict.fromkeys(names))) > 1:
        _check_together(own, chosen)
    for name in {*own.active.names, *chosen}:
        learns = trainable and name in chosen and not own.configs[name].inference_mode
        for adapter in own.adapters(name).values():
            _set_learning(adapter, learns)
    own.active.names = chosen


def _check_together(own: Trunk, names: tuple[str, ...]) -> None:
    replaced: dict[str, str] = {}
    for name in names:
        for path, adapter in own.adapters(name).items():
            copied = any(part.replacement is not None for part in adapter.parts())
            if copied and (other := replaced.setdefault(path, name)) != name:
                raise AdapterError(f"{other!r} and {name!r} both replace {path}: they cannot act together.")
    prompts = [name for name in names if own.stands_alone(name)]
    if len(prompts) > 1:
        raise AdapterError(
            f"{prompts} all put virtual tokens before the input, where each was trained to stand alone. Activate one "
            "of them; adapters at layers (LoRA and the like) can act beside it."
        )


def _set_learning(module: nn.Module, learns: bool) -> None:
    """`module.requires_grad_(learns)`, in a fifth of the time: switching is what many adapters on one trunk are for."""
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.requires_grad_(learns)
    for child in module._modules.values():
        if child is not None:
            _set_learning(child, learns)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base's own outputs inside the block: no adapter acts, none is trained."""
    active = trunk(model).active
    before = active.names, active.rows
    active.names, active.rows = (), None
    try:
        yield
    finally:
        active.names, active.rows = before


def delete(model: nn.Module, name: str) -> None:
    """Remove one adapter; its sites without another become plain modules again."""
    own = trunk(model)
    check_known(own, [name])
    if name in own.active.merged:
        check_unmerged(own)
    for path in own.adapters(name):
        sites.remove(own.sites[path], name)
        if "adapters" not in own.sites[path]._modules:
            del own.sites[path]
    del own.configs[name]
    own.active.names = tuple(other for other in own.active.names if other != name)


def detach(model: nn.Module) -> None:
    """Remove all adapters and restore which parameters train: the model as it was."""
    own = trunk(model)
    for name in list(own.configs):
        delete(model, name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in own.trainable)
    for name in own.repacking:
        weights.allow_repacking(model.get_submodule(name))
    for name in own.counting:
        sites.thaw_statistics(model.get_submodule(name), model.training)
    object.__delattr__(model, "_trunk")


def counts(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters; packed 4-bit weights count as what they stand for."""
    trainable = total = 0
    for parameter in model.parameters():
        size = _size(parameter)
        total += size
        trainable += size if parameter.requires_grad else 0
    return trainable, total


def _size(parameter: Tensor) -> int:
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
