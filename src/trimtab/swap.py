"""Class swap: a module of the user's own model gets a generated subclass (Mixin, OriginalClass), set in place.

No module is wrapped, no parameter renamed, and `super().forward` runs whatever the module is. The subclass keeps the
original's name and signature, because transformers, accelerate and Trainer look at both.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn


class Swapped:
    """Base of the mixins that generated classes put in front of a module's own class."""

    _original: ClassVar[type[nn.Module]]  # the class to go back to
    _mixin: ClassVar[type["Swapped"]]
    more: ClassVar[tuple[str, ...]] = ()  # arguments that forward takes beside those of the module
    order: ClassVar[int] = 0  # those of a higher one are in front, whichever came first

    @classmethod
    def namespace(cls, original: type[nn.Module]) -> dict[str, Any]:
        """What else the generated class holds."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Generated classes cannot be found by name: pickle the way to make them again."""
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        assert isinstance(reduced, tuple)
        _, arguments, *state = reduced
        return _rebuild, (*lineage(arguments[0]), *arguments[1:]), *state


def lineage(cls: type) -> tuple[tuple[type[Swapped], ...], type[nn.Module]]:
    """The mixins swapped into a class, innermost first, and the class it was before."""
    mixins: tuple[type[Swapped], ...] = ()
    while issubclass(cls, Swapped) and "_mixin" in vars(cls):
        mixins, cls = (cls._mixin, *mixins), cls._original
    return mixins, cls


def _rebuild(mixins: tuple[type[Swapped], ...], cls: type, *arguments: Any) -> nn.Module:
    made = functools.reduce(lambda made, mixin: _generated(mixin, made), mixins, cls)
    new: nn.Module = made.__new__(made, *arguments)
    return new


_made: dict[tuple[type[Swapped], type[nn.Module]], type[nn.Module]] = {}


def _generated(mixin: type[Swapped], original: type[nn.Module]) -> type[nn.Module]:
    """The class (mixin, original), made once: modules of one class stay of one class."""
    if (mixin, original) not in _made:
        _made[mixin, original] = _generate(mixin, original)
    return _made[mixin, original]


def _generate(mixin: type[Swapped], original: type[nn.Module]) -> type[nn.Module]:
    copied = ("__module__", "__qualname__", "__doc__")
    namespace: dict[str, Any] = {name: getattr(original, name) for name in copied}
    namespace |= {"_mixin": mixin, "_original": original}
    own = [cls for cls in mixin.__mro__ if issubclass(cls, Swapped) and "forward" in vars(cls)]
    if own:
        mixed: Callable[..., Any] = vars(own[0])["forward"]

        @functools.wraps(original.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # Whoever has wrapped this function may call it when the adapters are gone.
            call = mixed if isinstance(self, mixin) else original.forward
            return call(self, *args, **kwargs)

        # accelerate unwraps as long as there is something inside, and would go past the adapters.
        del forward.__wrapped__
        signature = inspect.signature(original.forward)
        forward.__signature__ = _with_more(signature, mixin.more)  # type: ignore[attr-defined]
        namespace |= {"forward": forward, "_arguments": tuple(signature.parameters)[1:]}
    namespace |= mixin.namespace(original)
    return types.new_class(original.__name__, (mixin, original), exec_body=lambda body: body.update(namespace))


def _with_more(signature: inspect.Signature, names: tuple[str, ...]) -> inspect.Signature:
    """The signature with optional keyword arguments more: `generate` and Trainer pass on what it names."""
    old = list(signature.parameters.values())
    new = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    last = len(old) - (old[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*old[:last], *new, *old[last:]])


def swap_in(module: nn.Module, mixin: type[Swapped]) -> None:
    """Put a mixin in front of the module's class."""
    mixins, original = lineage(type(module))
    ordered = sorted((*mixins, mixin), key=lambda one: one.order)
    _change_class(module, functools.reduce(lambda cls, one: _generated(one, cls), ordered, original))


def swap_out(module: nn.Module, mixin: type[Swapped]) -> None:
    """Take it away again."""
    mixins, original = lineage(type(module))
    kept = [other for other in mixins if other is not mixin]
    _change_class(module, functools.reduce(lambda cls, other: _generated(other, cls), kept, original))


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class also for accelerate's hooks (`device_map`), which keep the bound forward that they found."""
    bound = [name for name in FORWARDS if is_own(module, name)]
    module.__class__ = cls
    for name in bound:
        vars(module)[name] = types.MethodType(cls.forward, module)


FORWARDS = ("_old_forward", "forward")  # where accelerate keeps it while hooked, and leaves it when unhooked


def is_own(module: nn.Module, name: str) -> bool:
    """Whether this attribute of the module is the forward of its class, bound."""
    return getattr(vars(module).get(name), "__func__", None) is type(module).forward
