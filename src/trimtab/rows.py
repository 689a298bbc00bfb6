"""A different adapter for each row of one batch.

At a site every adapter gets the rows that are its own, and the site's own computation runs once on all of them. A
method can do its part for several adapters at once (`Adapter.after_groups`); the others take turns.

Rows are the first dimension of what a module gets and gives. Where there is one row for all (positions, mostly), it is
taken for each; where rows and tokens are one dimension, as in OPT, they are taken apart. Any other number is refused,
since nothing tells whose it would be.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import AdapterError

BASE = "__base__"  # HF PEFT's name for rows that no adapter acts on


class Call(Protocol):
    """A site's own computation, or that of the module in its place, on the whole batch or on one group of it."""

    def __call__(self, x: Any, group: "Group | None" = None, module: nn.Module | None = None) -> Any: ...


@dataclass(frozen=True, eq=False)
class Group:
    """The rows that have one adapter."""

    name: str
    rows: tuple[int, ...]
    length: int | None = None  # of these rows, where the batch is longer: what is behind it is padding

    @functools.cached_property
    def span(self) -> slice | None:
        """The rows, where they follow each other."""
        first, size = self.rows[0], len(self.rows)
        return slice(first, first + size) if self.rows == tuple(range(first, first + size)) else None


@dataclass(frozen=True)
class Units:
    """How rows of several groups lie as one tensor of equal blocks, each of one group."""

    rows: Tensor | None  # which they are, in their order; None for the whole batch
    count: int
    slots: Tensor | None  # the group of each block; None where that is the order of the groups


@dataclass(frozen=True)
class Plan:
    """What the groups mean at one site."""

    together: list[list[tuple[Any, Group]]]  # adapters of one kind, which are done at once
    apart: list[tuple[list[Any], Group]]  # in turns: each a stack, as of adapters that act one after another
    left: Group | None  # the rows that are not in `apart`

    @property
    def groups(self) -> list[Group]:
        """Those of `apart`, and what they leave."""
        return [*(group for _, group in self.apart), *([self.left] if self.left else [])]


class Rows:
    """The adapter of each row of a batch, by name. One object serves any number of batches of such rows."""

    def __init__(
        self,
        names: Sequence[str],
        lengths: Mapping[str, int] | None = None,
        generating: bool = False,
        fixed: bool = False,
    ) -> None:
        """lengths: of the rows of each name, in a batch that is padded at its end to the longest.

        generating: whether a batch may have each of the rows several times.
        fixed: whether adapters stay as they are as long as these rows act: nobody needs to look for changes.
        """
        self.names, self.generating, self.fixed = tuple(names), generating, fixed
        self.length = max(lengths.values()) if lengths else None
        known = lengths or {}
        where: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            where.setdefault(name, []).append(row)
        self.groups = {name: Group(name, tuple(rows), known.get(name)) for name, rows in where.items()}
        self.tokens: set[int] = set()  # how long the rows of the batch at hand are, as far as that is known
        self.filled = False  # whether rows of the batch at hand have a fill, for others' virtual tokens
        self.turning = False  # whether something is done for one group alone, just now
        self.kept: dict[Any, Any] = {}  # what methods want to find again in the next call
        self._plans: dict[int, Plan] = {}
        self._units: dict[tuple[str, ...], Units] = {}
        self._repeated: dict[int, Rows] = {1: self}

    def repeated(self, times: int) -> "Rows":
        """Each row so many times in turn, as `generate` has them for beams."""
        if times not in self._repeated:
            self._repeated[times] = Rows([name for name in self.names for _ in range(times)], fixed=self.fixed)
        return self._repeated[times]

    def turn(self, group: Group) -> contextlib.AbstractContextManager[None]:
        """Around what is done for one group alone."""
        return contextlib.nullcontext()

    def begin(self) -> Any:
        """What `again` needs to compute the same once more."""
        return None

    def again(self, begun: Any) -> contextlib.AbstractContextManager[None]:
        """Around what is computed a second time, for the backward pass."""
        return contextlib.nullcontext()

    def through(self, site: nn.Module, held: Mapping[str, Any], call: Call, x: Any) -> Any:
        """The site's output, each row's under its own adapter. `held` are the adapters at the site, by name."""
        plan = self._plans.get(id(site)) or self._plans.setdefault(id(site), self._plan(site, held))
        if not plan.together and not plan.apart:
            return call(x)
        if isinstance(x, Tensor) and x.dim():
            batch, here = len(self.names), len(x)
            if x.dim() == 1 and here in self.tokens and here != batch:
                x = x[None]
            if len(x) == 1:
                x = x.expand(batch, *x.shape[1:])
            elif x.dim() == 2 and here % batch == 0 and here // batch in self.tokens - {1}:
                flat = _flat(call)
                return self.through(site, held, flat, x.view(batch, -1, x.shape[1])).flatten(0, 1)
        self.check(site, x)
        if plan.apart:
            return self._apart(site, plan, call, x)
        return self._together(site, plan, call(x), x)

    def _together(self, site: nn.Module, plan: Plan, y: Any, x: Any, own: bool = True) -> Any:
        """y after all that is done at once. own: it is the site's own output, of this x."""
        self.check(site, y)
        for members in plan.together:
            y, own = type(members[0][0]).after_groups(site, members, x, y, self, own), False
        return y

    def _plan(self, site: nn.Module, held: Mapping[str, Any]) -> Plan:
        together: dict[type, list[tuple[Any, Group]]] = {}
        apart: list[tuple[list[Any], Group]] = []
        for name, group in self.groups.items():
            stack = [part for part in held[name].parts() if not part.on_input] if name in held else []
            if len(stack) == 1 and stack[0].joins(site):
                together.setdefault(type(stack[0]), []).append((stack[0], group))
            elif stack:
                apart.append((stack, group))
        taken = {row for _, group in apart for row in group.rows}
        left = tuple(row for row in range(len(self.names)) if row not in taken)
        return Plan(list(together.values()), apart, Group(BASE, left, self.length) if left else None)

    def check_means(self, stack: Sequence[Any]) -> None:
        """Raise an AdapterError where an adapter would take a mean over more than a row's own tokens."""
        if self.filled and any(adapter.takes_means for adapter in stack):
            raise AdapterError(
                "A gate takes the mean over the tokens of a row, and other rows' virtual tokens fill this one up. In "
                "one batch with gated adapters use prefix tuning, or prompts of one length."
            )

    def _apart(self, site: nn.Module, plan: Plan, call: Call, x: Any) -> Any:
        for stack, _ in plan.apart:
            self.check_means(stack)
        own = self.parted(plan.groups, x)
        inputs = [[part] for part in own]  # what each adapter of a group's stack gets, from the last to the first
        for (stack, group), found in zip(plan.apart, inputs, strict=False):
            with self.turn(group):
                for adapter in reversed(stack):
                    found.append(adapter.before(site, found[-1]))
        ready = [found.pop() if len(found) > 1 else found[0] for found in inputs]
        modules = [next((part.replacement for part in stack if part.replacement), None) for stack, _ in plan.apart]
        if any(modules):
            modules += [None] * (len(ready) - len(modules))
            given = zip(ready, plan.groups, modules, strict=True)
            parts = [call(part, group, module) for part, group, module in given]
            y = self._together(site, plan, self.joined(plan.groups, parts), x, own=False)
        else:
            same = all(after is before for after, before in zip(ready, own, strict=True))
            whole = x if same else self.joined(plan.groups, ready)
            y = self._together(site, plan, call(whole), whole)
        outputs = self.parted(plan.groups, y)
        for number, (stack, group) in enumerate(plan.apart):
            with self.turn(group):
                for adapter in stack:
                    outputs[number] = adapter.after(site, inputs[number].pop(), outputs[number])
        return self.joined(plan.groups, outputs)

    def parted(self, groups: Sequence[Group], value: Any) -> list[Any]:
        """What is each group's; `groups` have all rows together."""
        spans = [group.span for group in groups]
        follow = all(spans) and [row for group in groups for row in group.rows] == list(range(len(self.names)))
        if not (follow and isinstance(value, Tensor) and value.dim() and len(value) == len(self.names)):
            return [self.of(group, value) for group in groups]
        # As one function: the gradient of so many slices would be so many batches.
        parts: Any = torch.split(value, [len(group.rows) for group in groups])
        return [self._shortened(group, part) for group, part in zip(groups, parts, strict=True)]

    def of(self, group: Group, value: Any) -> Any:
        """What is a group's in a tensor, or in the tensors in tuples, lists and mappings."""
        if not isinstance(value, Tensor):
            return _zipped(lambda part: self.of(group, part), value)
        if value.dim() == 0 or len(value) != len(self.names):
            return value
        own = value[group.span] if group.span else value[torch.tensor(group.rows, device=value.device)]
        return self._shortened(group, own)

    def _shortened(self, group: Group, part: Tensor) -> Tensor:
        """A group's rows without their padding."""
        shorter = group.length != self.length and self._has_length(part) and part.shape[1] == self.length
        return part[:, : group.length] if shorter else part

    def joined(self, groups: Sequence[Group], parts: Sequence[Any]) -> Any:
        """Of what the groups have, which are all rows together, one batch in the order of its rows."""
        first = parts[0]
        if not isinstance(first, Tensor):
            return _zipped(lambda *found: self.joined(groups, found), *parts)
        if first.dim() == 0 or len(first) != len(groups[0].rows):
            return first
        if self.length is not None:
            parts = [self._lengthened(group, part) for group, part in zip(groups, parts, strict=True)]
        order = [row for group in groups for row in group.rows]
        whole = torch.cat([part.to(first.dtype) for part in parts])
        if order == sorted(order):
            return whole
        return whole[torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=whole.device)]

    def each(self, site: nn.Module, run: Callable[[Group, Any], Any], given: Any) -> Any:
        """What `run` gives for each group by itself, together; given: tensors of the batch, in containers.

        Rows and their tokens may be one dimension, as they mostly are where experts are chosen.
        """
        batch, size = len(self.names), next((len(value) for value in _tensors(given) if value.dim()), 0)
        times = size // batch
        if size % batch or (times != 1 and times not in self.tokens):
            self.check(site, given)

        def own(value: Any, rows: Tensor) -> Any:
            if not isinstance(value, Tensor):
                return _zipped(lambda part: own(part, rows), value)
            if value.dim() == 0 or len(value) != size:
                return value
            return value.reshape(batch, times, *value.shape[1:])[rows.to(value.device)].flatten(0, 1)

        def whole(*parts: Any) -> Any:
            first = parts[0]
            if not isinstance(first, Tensor):
                return _zipped(whole, *parts)
            if first.dim() == 0 or len(first) != times * len(order[0]):
                self.check(site, first)
            joined = torch.cat([part.reshape(-1, times, *part.shape[1:]) for part in parts])
            return joined[torch.cat(order).argsort().to(joined.device)].flatten(0, 1)

        groups = list(self.groups.values())
        order = [torch.tensor(group.rows) for group in groups]
        return whole(*(run(group, own(given, rows)) for group, rows in zip(groups, order, strict=True)))

    def _has_length(self, value: Tensor) -> bool:
        """Whether the second dimension is the length: of ids (B, T) and features (B, T, n), not of values (B, n)."""
        return value.dim() == 3 or (value.dim() == 2 and not value.is_floating_point())

    def _lengthened(self, group: Group, part: Tensor) -> Tensor:
        if group.length == self.length or not self._has_length(part) or part.shape[1] != group.length:
            return part
        assert self.length is not None
        return F.pad(part, (*[0, 0] * (part.dim() - 2), 0, self.length - part.shape[1]))

    def units(self, names: tuple[str, ...]) -> Units:
        """The rows of these groups in blocks: as few as have one group each."""
        return self._units.get(names) or self._units.setdefault(names, self._blocks(names))

    def _blocks(self, names: tuple[str, ...]) -> Units:
        slot = {row: number for number, name in enumerate(names) for row in self.groups[name].rows}
        rows = sorted(slot)
        size = math.gcd(*(len(list(run)) for _, run in itertools.groupby(rows, slot.__getitem__)))
        slots = [slot[row] for row in rows[::size]]
        return Units(
            None if len(rows) == len(self.names) else torch.tensor(rows),
            len(slots),
            None if slots == list(range(len(names))) else torch.tensor(slots),
        )

    def check(self, site: nn.Module, value: Any) -> None:
        """Raise an AdapterError where the rows are not what comes first."""
        if isinstance(value, Tensor) and value.shape[:1] == (len(self.names),):
            return
        parts = [value] if isinstance(value, Tensor) else _parts(value)
        found = next((part for part in parts if isinstance(part, Tensor)), None)
        if found is None or found.dim() == 0 or len(found) != len(self.names):
            what = "no tensor" if found is None else f"one of shape {tuple(found.shape)}"
            raise AdapterError(
                f"Adapters are chosen for {len(self.names)} rows, and a {type(site).__name__} with an adapter gets or "
                f"gives {what}: which of it is whose cannot be told. Leave such modules out (exclude_modules), or use "
                "one adapter for the whole batch."
            )


def _flat(call: Call) -> Call:
    """The call for rows and tokens apart, where it is itself for both as one dimension."""

    def flat(x: Tensor, group: Group | None = None, module: nn.Module | None = None) -> Tensor:
        y: Tensor = call(x.flatten(0, 1), group, module)
        return y.view(*x.shape[:2], *y.shape[1:])

    return flat


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, tuple | list) else [value]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    containers = isinstance(value, Mapping | tuple | list)
    return [found for part in _parts(value) for found in _tensors(part)] if containers else []


def _zipped(change: Callable[..., Any], *values: Any) -> Any:
    """The change of the parts of containers of one form; anything else as the first has it."""
    first = values[0]
    if isinstance(first, Mapping):
        made = {name: change(*(value[name] for value in values)) for name in first}
        return type(first)(**made) if type(first) is not dict else made
    if isinstance(first, tuple | list):
        return type(first)([change(*parts) for parts in zip(*values, strict=True)])
    if isinstance(first, Tensor):
        return change(*values)
    return first
