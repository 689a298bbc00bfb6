"""Rows of one batch under different adapters, for those that act on the arguments of a module: virtual tokens, mostly.

Each group's adapters get the arguments of its rows, and what they make of them is put together again. They may put
different numbers of virtual positions before their rows: C into the cache, P at the embedding. The others are filled up
to the most of each with positions that are masked. Where the model writes on, P is filled in front, so that all rows
end together; where it reads a whole text, behind, so that all begin together.

    in the cache    [fill][C_1 virtual] [fill][P_1 virtual][tokens]         [P_1 virtual][tokens][fill]
                    [C_2 virtual      ] [P_2 virtual      ][tokens]         [P_2 virtual      ][tokens]

Later a cache holds such rows, and each group sees it without its fill.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import AdapterError
from .rows import Group, Rows

FILLS = {"labels": -100}  # in front; other arguments have 0 there, which in a mask means padding


class SeenCache:
    """The key-value cache of a batch as one group sees it: its own rows, without what fills them up."""

    def __init__(self, group: Group, real: Any = None, lead: int = 0) -> None:
        self.rows, self.real, self.lead = list(group.rows), real, lead
        self.states: list[tuple[Tensor, Tensor]] = []  # what the group's adapter puts in front, by layer

    @property
    def is_compileable(self) -> bool:
        return bool(getattr(self.real, "is_compileable", False))

    def get_seq_length(self, *ignored: Any) -> int:
        whole: int = self.real.get_seq_length() if self.real is not None else 0
        return whole - self.lead if whole else 0

    def update(self, keys: Tensor, values: Tensor, *ignored: Any) -> None:
        self.states.append((keys, values))

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """The states, which are then in the real cache."""
        taken, self.states = self.states, []
        return taken


def around(rows: Rows, site: Any, held: Mapping[str, Any], given: dict[str, Any], call: Callable[..., Any]) -> Any:
    """The result of a module for arguments by name, each row's under its own adapters. `held`: those here, by name."""
    groups = list(rows.groups.values())
    stacks = [[part for part in held[one.name].parts() if part.on_input] if one.name in held else [] for one in groups]
    if not any(stacks):
        return call(**given)
    batch = _Batch(rows, site, groups, stacks, given)
    rows.filled = rows.filled or any(batch.differs(batch.front, batch.behind, axis=axis) for axis in batch.axes)
    calls: list[list[tuple[Any, dict[str, Any]]]] = []
    parts: list[dict[str, Any]] = []
    for number, (group, stack) in enumerate(zip(groups, stacks, strict=True)):
        rows.check_means(stack)
        own, made = batch.given_to(number), []
        with rows.turn(group), site._active.only(group):
            for adapter in reversed(stack):
                made.append((adapter, own))
                own = adapter.inputs(site, own)
        calls.append(made)
        parts.append(dict(own))
    result = call(**batch.together(parts))
    lengths = [_length(part) for part in parts]
    results = []
    for number, (group, made) in enumerate(zip(groups, calls, strict=True)):
        found = batch.cut(batch.seen(number, result), max(lengths), lengths[number])
        with rows.turn(group), site._active.only(group):
            for adapter, arguments in reversed(made):
                found = adapter.outputs(site, batch.as_given(arguments), found)
        results.append(found)
    named = next(found for found, stack in zip(results, stacks, strict=True) if stack)
    if isinstance(named, tuple):  # as the caller asked for it, and an adapter did not
        results = [found if isinstance(found, tuple) else found.to_tuple() for found in results]
    return batch.joined(results)


class _Batch:
    """The arguments of one call, by groups and together."""

    def __init__(
        self, rows: Rows, site: Any, groups: list[Group], stacks: list[list[Any]], given: dict[str, Any]
    ) -> None:
        self.rows, self.site, self.groups, self.given = rows, site, groups, given
        # Of an encoder-decoder the decoder's arguments have names of their own, and the cache is the decoder's.
        self.axes = ("", "decoder_") if "decoder_input_ids" in site._arguments else ("",)
        # The virtual positions of each group: in the cache, and at the embedding with the fill in front or behind.
        self.cached, self.front, self.behind = (
            {axis: [sum(one.ahead for one in stack if (one.axis, _place_of(one)) == (axis, place)) for stack in stacks]
             for axis in self.axes}
            for place in ("cache", "front", "behind")
        )  # fmt: skip
        adapters = [adapter for stack in stacks for adapter in stack]
        self.filler = next((adapter for adapter in adapters if adapter.fills_cache), None)
        self.fed = any(getattr(adapter, "feeds_decoder", False) for adapter in adapters)
        self.cache = given.get("past_key_values")
        self.views = [SeenCache(group) for group in groups] if self.filler and self.cache is None else None

    def lead(self, number: int, axis: str) -> int:
        """How many positions fill up a group's rows in the cache."""
        return sum(max(own[axis]) - own[axis][number] for own in (self.cached, self.front))

    def differs(self, *places: dict[str, list[int]], axis: str) -> bool:
        return any(len(set(own[axis])) > 1 for own in places)

    def seen(self, number: int, value: Any) -> Any:
        """What is of a group's rows; caches as it sees them."""
        if hasattr(value, "get_seq_length"):
            kept = vars(value).setdefault("of_rows", {})
            view = SeenCache(self.groups[number], value, self.lead(number, self.axes[-1]))
            return kept.setdefault((self.groups[number].name, self.groups[number].rows), view)
        if isinstance(value, Mapping):
            found = {name: self.seen(number, part) for name, part in value.items()}
            return type(value)(**found) if type(value) is not dict else found
        return self.rows.of(self.groups[number], value)

    def given_to(self, number: int) -> dict[str, Any]:
        own: dict[str, Any] = self.seen(number, self.given)
        if self.views is not None:
            own["past_key_values"] = self.views[number]
        mask = own.get("attention_mask")
        if self.fed and mask is not None and mask.shape[-1] == _length(own) + max(self.behind[""]):
            own["attention_mask"] = mask[:, : _length(own) + self.behind[""][number]]  # the root has widened it
        return own

    def as_given(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Without the cache that nobody gave."""
        return {**arguments, "past_key_values": None} if self.views is not None else arguments

    def together(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        if any(part.get("inputs_embeds") is not None for part in parts):
            for part in parts:
                if part.get("inputs_embeds") is None:
                    part["inputs_embeds"] = self.site.get_input_embeddings()(part["input_ids"])
                    part["input_ids"] = None
        for axis in self.axes:
            if self.differs(self.cached, self.front, self.behind, axis=axis):
                for number, part in enumerate(parts):
                    self._place(part, axis, number)
        made = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            values = [part.get(name) for part in parts]
            if name == "past_key_values":
                made[name] = self._cache(values)
            elif name.endswith("attention_mask") and isinstance(values[0], Tensor):
                made[name] = self.joined([self._masked(part, name, number) for number, part in enumerate(parts)])
            else:
                made[name] = self.joined(values, FILLS.get(name, 0))
        self.rows.tokens.add(_length(made))
        return made

    def _masked(self, part: dict[str, Any], name: str, number: int) -> Tensor:
        """A group's mask with all of its fill."""
        mask: Tensor = part[name]
        axis = name.removesuffix("attention_mask")
        if axis not in self.axes or mask.dim() != 2:
            return mask
        own = self.cached[axis][number]
        mask = torch.cat(
            [mask[:, :own], F.pad(mask[:, own:], (max(self.front[axis]) - self.front[axis][number], 0))], 1
        )
        return F.pad(mask, (max(self.cached[axis]) - own, max(self.behind[axis]) - self.behind[axis][number]))

    def _place(self, part: dict[str, Any], axis: str, number: int) -> None:
        """Give a group's part the mask and the positions that, left out, would be wrong for rows with a fill."""
        mask, positions = f"{axis}attention_mask", f"{axis}position_ids"
        length = self._tokens(axis)
        seen = int(self.cache.get_seq_length()) if self.cache is not None and axis == self.axes[-1] else 0
        ahead = self.cached[axis][number] + self.front[axis][number]
        end = (seen - max(self.cached[axis]) - max(self.front[axis]) if seen else 0) + ahead + length
        end += self.behind[axis][number] if not seen else 0
        own = _length(part, axis) or length
        some = next(value for value in part.values() if isinstance(value, Tensor))
        if part.get(mask) is None and mask in self.site._arguments:
            size = len(self.groups[number].rows), end
            part[mask] = torch.ones(size, dtype=torch.long, device=some.device)
        if not self.differs(self.cached, self.front, axis=axis) or part.get(positions) is not None:
            return
        table = _own_positions(self.site)
        if positions in self.site._arguments and table is not None:
            part[positions] = torch.arange(end - own, end, device=some.device)[None] + table
        elif table is not None and getattr(self.site.config, "max_position_embeddings", None):
            raise AdapterError(
                f"{type(self.site).__name__} counts positions by itself, so that rows with fewer virtual tokens than "
                "others would stand at wrong ones. In one batch use adapters with equally many."
            )

    def _tokens(self, axis: str) -> int:
        """How many tokens the rows of this call have, virtual ones left out."""
        if axis == "" and self.given.get("encoder_outputs") is not None:
            virtual: int = max(self.behind[axis])
            return int(self.given["encoder_outputs"][0].shape[1]) - virtual
        return _length(self.given, axis) or int(self.given["labels"].shape[1])

    def _cache(self, values: list[Any]) -> Any:
        views = [value for value in values if isinstance(value, SeenCache)]
        if any(view.states for view in views):
            assert self.filler is not None
            found = [view.take() for view in views]
            layers = max(map(len, found))
            states = [self._states([own[layer] if own else None for own in found]) for layer in range(layers)]
            return self.filler.fill(self.site, self.cache, states)
        fixed = next((value for value in values if hasattr(value, "states") and not isinstance(value, SeenCache)), None)
        if fixed is not None:  # in a layer that is checkpointed, where there is no other
            return type(fixed)(self._states([getattr(value, "states", None) for value in values]))
        return self.cache

    def _states(self, states: list[Any]) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows, filled up in front."""
        keys, _ = next(found for found in states if found is not None)
        longest = max(found[0].shape[2] for found in states if found is not None)
        full: list[list[Tensor]] = [[], []]
        for group, found in zip(self.groups, states, strict=True):
            empty = keys.new_zeros(len(group.rows), keys.shape[1], 0, keys.shape[3])
            for side, part in zip(full, found or (empty, empty), strict=True):
                side.append(F.pad(part, (0, 0, longest - part.shape[2], 0)))
        joined = [self.rows.joined(self.groups, side) for side in full]
        return joined[0], joined[1]

    def joined(self, parts: Sequence[Any], fill: int = 0) -> Any:
        """What the groups have, as one batch; rows that are shorter in the second dimension are filled up in front."""
        first = next((part for part in parts if part is not None), None)
        if isinstance(first, SeenCache):
            return first.real
        if isinstance(first, Mapping):
            names = [name for name in first if all(name in part for part in parts)]
            found = {name: self.joined([part[name] for part in parts]) for name in names}
            return type(first)(**found) if type(first) is not dict else found
        if isinstance(first, tuple | list):
            return type(first)(self.joined(each) for each in zip(*parts, strict=True))
        if not isinstance(first, Tensor) or all(part is first for part in parts):
            changed = [part for part in parts if part is not None and part is not first]
            return changed[0] if changed and not isinstance(first, Tensor) else first
        if first.dim() == 0:
            raise AdapterError("An adapter makes a loss of its own, which is one for all rows. Use it for all of them.")
        longest = max(part.shape[1] if part.dim() > 1 else 0 for part in parts)
        full = []
        for group, part, own in zip(self.groups, parts, self.behind[""], strict=True):
            whole = part.expand(len(group.rows), *part.shape[1:])
            if more := longest - whole.shape[1] if whole.dim() > 1 else 0:
                end = min(more, max(self.behind[""]) - own)
                whole = F.pad(whole, (*[0, 0] * (whole.dim() - 2), more - end, end), value=fill)
            full.append(whole)
        return self.rows.joined(self.groups, full)

    def cut(self, value: Any, whole: int, length: int) -> Any:
        """Features of so many positions without their fill."""
        if isinstance(value, Mapping):
            return type(value)(**{name: self.cut(part, whole, length) for name, part in value.items()})
        if isinstance(value, tuple):
            return tuple(self.cut(part, whole, length) for part in value)
        if length == whole or not isinstance(value, Tensor) or value.dim() != 3 or value.shape[1] != whole:
            return value
        return value[:, :length] if any(self.behind[""]) else value[:, whole - length :]


def _place_of(adapter: Any) -> str:
    return "cache" if adapter.fills_cache else "behind" if adapter.fills_behind else "front"


def _length(given: Mapping[str, Any], axis: str = "") -> int:
    """The number of positions of the ids or embeddings, 0 where there are none."""
    names = (f"{axis}inputs_embeds", f"{axis}input_ids")
    found = next((given[name] for name in names if given.get(name) is not None), None)
    return 0 if found is None else int(found.shape[1])


def _own_positions(site: Any) -> int | None:
    """The number of the first position, or None where the model counts the ones in the mask."""
    for part in site.modules():
        if part is not site and "position" in type(part).__name__.lower():
            arguments = getattr(getattr(type(part).forward, "__code__", None), "co_varnames", ())
            if "attention_mask" in arguments:
                return None
    tables = [part for part in site.modules() if hasattr(part, "create_position_ids_from_input_ids")]
    return tables[0].padding_idx + 1 if tables else 0
