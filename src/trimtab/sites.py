"""Sites: modules of the user's own model at which adapters act, by a class swap (swap.py), and which of them act."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from . import weights
from .adapter import Adapter, InputAdapter
from .errors import AdapterError, TargetError
from .row_inputs import around
from .rows import Group, Rows
from .swap import FORWARDS, Swapped, is_own, lineage, swap_in, swap_out


class Active:
    """Which adapters act: one object for the whole model, read by every site at every call."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()  # in the order in which they nest
        self.merged: tuple[str, ...] = ()  # folded into the weights, so they act without being called
        self.rows: Rows | None = None  # in place of `names`: which one acts on each row of the batch

    @contextlib.contextmanager
    def only(self, group: Group) -> Iterator[None]:
        """Inside the block the batch has the rows of this group alone."""
        before, self.rows = self.rows, Rows([group.name] * len(group.rows))
        self.rows.tokens = before.tokens if before is not None else set()
        try:
            yield
        finally:
            self.rows = before


class AnySite(Swapped, nn.Module):
    """What all kinds of site hold. `adapters` are all that are loaded here, active or not."""

    _arguments: ClassVar[tuple[str, ...]]  # the names of forward's parameters
    adapters: nn.ModuleDict
    _active: Active
    _kept: dict[str, Any]  # while merged: the parameters as they were

    @classmethod
    def namespace(cls, original: type[nn.Module]) -> dict[str, Any]:
        """nn.Sequential calls all that it finds in itself: the adapters are no part of the chain."""
        if not issubclass(original, nn.Sequential):
            return {}

        def own(site: AnySite) -> list[nn.Module | None]:
            return [module for name, module in site._modules.items() if name != "adapters"]

        return {"__iter__": lambda site: iter(own(site)), "__len__": lambda site: len(own(site))}

    def acting(self, on_input: bool = False) -> list[Adapter]:
        """The adapters that shape this call: active, and not already in the weights.

        Args:
            on_input: those that act on the arguments by name, instead of those that act around the call.
        """
        held, active = adapters(self)._modules, self._active
        if active.rows is not None and any(name in held for name in active.rows.groups):
            raise AdapterError(
                f"A {type(self).__name__} reads its adapters' weights or takes other arguments for them, which is "
                "possible for one adapter at a time only, not for each row another. Leave it out of the adapters."
            )
        names = [name for name in active.names if name in held and name not in active.merged]
        stack = [part for name in names for part in cast(Adapter, held[name]).parts()]
        return [adapter for adapter in stack if isinstance(adapter, InputAdapter) == on_input]

    def acts_alone(self, adapter: Adapter) -> bool:
        """Whether this adapter is all that shapes this call."""
        return self._active.rows is None and self.acting() == [adapter]


class Site(AnySite):
    """A module that is called: its adapters act around its own forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = super().forward
        if self._active.rows is not None:
            return self._by_rows(self._active.rows, call, args, kwargs)
        stack = self.acting()
        if not stack:
            return call(*args, **kwargs)
        name = self._by_name(args, kwargs)
        x = args[0] if args else kwargs.pop(name) if name else None
        for adapter in stack:
            if adapter.replacement is not None:
                call = adapter.replacement
        inputs = []
        for adapter in reversed(stack):
            inputs.append(x)
            x = adapter.before(self, x)
        if args:
            y = call(x, *args[1:], **kwargs)
        else:
            y = call(**{name: x}, **kwargs) if name else call()
        for adapter in stack:
            y = adapter.after(self, inputs.pop(), y)
        return y

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """The input's name where it is given by keyword: the first parameter, or where that is left out any."""
        return None if args else next((name for name in (*self._arguments[:1], *kwargs) if name in kwargs), None)

    def _by_rows(self, rows: Rows, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self._by_name(args, kwargs)
        x = args[0] if args else kwargs.pop(name) if name else None

        def call(x: Any, group: Group | None = None, module: nn.Module | None = None) -> Any:
            run = own if module is None else module
            others, named = (args[1:], kwargs) if group is None else rows.of(group, (args[1:], kwargs))
            if args:
                return run(x, *others, **named)
            return run(**{name: x}, **named) if name else run()

        return rows.through(self, adapters(self)._modules, call, x)


class InputSite(AnySite):
    """The model, or a large part of it: its adapters act on the arguments and the result of its forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._active.rows is not None:
            given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
            call = super().forward
            return around(self._active.rows, self, adapters(self)._modules, given, lambda **own: call(**self.own(own)))
        stack = cast(list[InputAdapter], self.acting(on_input=True))
        if not stack:
            return super().forward(*args, **self.own(kwargs))
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        calls = []
        for adapter in reversed(stack):
            calls.append((adapter, given))
            given = adapter.inputs(self, given)
        result = super().forward(**self.own(given))
        for adapter, given in reversed(calls):
            result = adapter.outputs(self, given, result)
        return result

    def own(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments that are the module's: without those that are for adapters alone."""
        return {name: value for name, value in given.items() if name not in self.more}


class ReadSite(AnySite):
    """A module whose weights its parent reads without calling it, so that `after` would never run.

    nn.MultiheadAttention reads its out_proj, and nn.TransformerEncoderLayer on its fast path all of its parts.
    Here reading `site.weight` gives the folded weight, whoever reads it.
    """

    @classmethod
    def namespace(cls, original: type[nn.Module]) -> dict[str, Any]:
        attention = issubclass(original, nn.MultiheadAttention)
        weight, bias = ("in_proj_weight", "in_proj_bias") if attention else ("weight", "bias")
        return {
            weight: property(lambda site: fold_weight(site, site._parameters[weight], site.acting())),
            bias: property(lambda site: fold_bias(site, site._parameters[bias], site.acting())),
        }


class ParameterSite(AnySite):
    """A module with parameters of its own, whatever it does with them: reading them gives what its adapters make of
    them (`folds`), while it is called the same each time.
    """

    def __getattr__(self, name: str) -> Any:  # nn.Module's way to find its parameters
        if name in vars(self).get("_parameters", ()) and "_active" in vars(self) and name in self.folds():
            return folded_parameter(self, name, self.acting())
        return super().__getattr__(name)

    def folds(self) -> set[str]:
        """The names of all that some adapter here changes, active or not."""
        held = cast(Iterable[Adapter], adapters(self)._modules.values())
        return {name for adapter in held for part in adapter.parts() for name in part.folds}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows, held, call = self._active.rows, adapters(self)._modules, super().forward

        def run(acting: list[Adapter], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            folded = {name: folded_parameter(self, name, acting) for name in self.folds()}
            vars(self).update(folded)  # found before `__getattr__` is asked
            try:
                return call(*args, **kwargs)
            finally:
                for name in folded:
                    del vars(self)[name]

        if rows is None or not any(name in held for name in rows.groups):
            return run(self.acting(), args, kwargs)

        def of_group(group: Group, given: Any) -> Any:
            with rows.turn(group), self._active.only(group):
                return run(cast(Adapter, held[group.name]).parts() if group.name in held else [], *given)

        return rows.each(self, of_group, (args, kwargs))


class FrozenStatistics(Swapped, nn.Module):
    """A norm of the base that counts means and variances in training: there too it takes those that it has.

    Else every training step would change the base, and the saved adapter would act on another one.
    """

    def train(self, mode: bool = True) -> Self:
        super().train(mode)  # the adapters here follow
        self.training = False
        return self


def freeze_statistics(module: nn.Module) -> bool:
    """Make a norm with running statistics keep them; whether it is one."""
    if module._buffers.get("running_mean") is None:
        return False
    swap_in(module, FrozenStatistics)
    module.train(module.training)
    return True


def thaw_statistics(module: nn.Module, training: bool) -> None:
    swap_out(module, FrozenStatistics)
    module.train(training)


def fold_weight(site: nn.Module, stored: Tensor | None, adapters: list[Adapter]) -> Tensor | None:
    """The stored weight with adapters folded in, in the stored layout."""
    if not adapters:
        return stored
    shape = weights.layout(site)
    folded = folded_weight(site, adapters)
    return folded.T if shape and shape.transposed else folded


def fold_bias(site: nn.Module, stored: Tensor | None, adapters: list[Adapter]) -> Tensor | None:
    folded = stored
    for adapter in adapters:
        folded = adapter.merged_bias(site, folded)
    return folded if stored is None or folded is None else folded.to(stored.dtype)


def folded_weight(site: nn.Module, adapters: list[Adapter]) -> Tensor:
    """The dense weight (out, in / groups, *kernel) with adapters folded in, in their order."""
    weight = weights.read(site)
    dtype = weight.dtype
    for adapter in adapters:
        weight = adapter.merged(site, weight.to(weights.master_dtype(dtype)))
    return weight.to(dtype)


def folded_parameter(site: nn.Module, name: str, adapters: list[Adapter]) -> Tensor:
    """The stored parameter of this name with those of the adapters folded in that change it by name."""
    value = cast(Tensor, site._parameters[name])
    for adapter in adapters:
        if name in adapter.folds:
            value = adapter.folded(site, name, value)
    return value


def is_read(module: nn.Module, parent: nn.Module | None) -> bool:
    """Whether somebody else reads this module's weights instead of calling it."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    read_by = nn.MultiheadAttention | nn.TransformerEncoderLayer
    return isinstance(parent, read_by) and isinstance(module, nn.Linear | nn.LayerNorm)


def plain_copy(module: nn.Module) -> nn.Module:
    """A deep copy of the module as it would be without adapters."""
    copied = copy.deepcopy(module)
    for site in list(sites(copied)):
        for name in list(adapters(site)):
            remove(site, name)
    for part in copied.modules():
        if isinstance(part, FrozenStatistics):
            thaw_statistics(part, module.training)
    return copied


def adapters(site: AnySite) -> nn.ModuleDict:
    """All that are loaded at the site: `site.adapters`, which at the root is the method of `PeftModel`."""
    return cast(nn.ModuleDict, site._modules["adapters"])


def sites(model: nn.Module) -> Iterator[AnySite]:
    return (module for module in model.modules() if isinstance(module, AnySite))


def check_free(name: str, module: nn.Module) -> None:
    """Raise a TargetError where the name `adapters` is taken."""
    if not isinstance(module, AnySite) and ("adapters" in vars(module) or "adapters" in module._modules):
        raise TargetError(
            f"{name or 'The model'} ({type(module).__name__}) has something called `adapters` of its own."
        )


def check(name: str, module: nn.Module, parent: nn.Module | None, adapter: Adapter) -> None:
    """Raise a TargetError where this adapter would not act at this module."""
    if adapter.replacement is not None and isinstance(module, InputSite):
        raise TargetError(f"modules_to_save: {name} takes the virtual tokens of another adapter. Save parts of it.")
    check_free(name, module)
    if getattr(type(module).forward, "__name__", "") == "_forward_unimplemented":
        raise TargetError(f"{name} is a {type(module).__name__}, which is never called. Name the modules inside it.")
    if "forward" in vars(module) and not any(is_own(module, name) for name in FORWARDS):
        raise TargetError(
            f"{name or 'The model'} has a forward of its own, which would pass by the adapter (accelerate puts one "
            "there for mixed precision). Take it away with `del module.forward`, or patch it after attaching adapters."
        )
    if weights.is_sharded(module):
        raise TargetError(f"{name} is sharded, and the new adapter would not be. Attach adapters before sharding.")
    if isinstance(adapter, InputAdapter):
        return
    meta = torch.get_default_device().type != "meta" and any(value.is_meta for value in adapter.parameters())
    if (meta or adapter.replacement is not None) and any(weights.is_offloaded(part) for part in module.modules()):
        raise TargetError(f"{name} is offloaded, so there are no values to train a copy of. Load the model whole.")
    if not is_read(module, parent):
        return
    rule = f"{name} is never called: {type(parent or module).__name__} reads its weight. So an adapter must be foldable"
    if type(adapter).merged is Adapter.merged:
        raise TargetError(f"{rule}, which {type(adapter).__name__} is not. Leave it out with exclude_modules.")
    if adapter.dropout:
        raise TargetError(f"{rule} and its dropout 0, not {adapter.dropout}; or leave it out with exclude_modules.")
    if adapter.draws:
        raise TargetError(f"{rule}, and {type(adapter).__name__} draws anew for every token. "
                          "Leave it out with exclude_modules.")  # fmt: skip


def add(module: nn.Module, parent: nn.Module | None, name: str, adapter: Adapter, active: Active) -> "AnySite":
    """Put an adapter at a module, making a site of it where it is none yet."""
    for part in adapter.parts():
        usual = InputSite if isinstance(part, InputAdapter) else ReadSite if is_read(module, parent) else Site
        mixin: type[AnySite] = part.site or usual
        if isinstance(part, InputAdapter) and not isinstance(module, mixin):
            swap_out(module, InputSite)  # two of them would call the adapters twice
        if not isinstance(module, mixin):
            swap_in(module, mixin)
    assert isinstance(module, AnySite)
    if "adapters" not in module._modules:
        module.adapters = nn.ModuleDict().train(module.training)
        module._active = active
    adapters(module)[name] = adapter
    return module


def remove(module: AnySite, name: str) -> None:
    """Take an adapter from a site; with its last adapter the site is a plain module again."""
    del adapters(module)[name]
    if not len(adapters(module)):
        for attribute in ("adapters", "_active"):
            delattr(module, attribute)
        for mixin in lineage(type(module))[0]:
            if issubclass(mixin, AnySite):
                swap_out(module, mixin)
