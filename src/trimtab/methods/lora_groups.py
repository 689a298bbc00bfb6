"""LoRA's products of several adapters, each on rows of its own of one batch, as one product of stacked A and B.

Ranks are filled up with zeros to the next power of two; those of one such rank make one batched product.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import kernels
from ..rows import Group, Rows
from ..stacks import Stacks, all_adapted, plain_products, products

Members = Sequence[tuple[Any, Group]]  # LoRA adapters of one site, and the rows of each
SETTINGS, PAIR = itemgetter("training", "dropout", "scale"), itemgetter("A", "B")


def after(site: nn.Module, members: Members, x: Tensor, y: Tensor, rows: Rows, own: bool) -> Tensor:
    """y (rows, ..., o) + s B A drop(x) with each row's own s, B and A. own: y is the site's own output, of this x."""
    known = kernels.known(site, x)
    x = x.to(kernels.compute_dtype(x))
    W = kernels.base_weight(site, x, y) if own and known else None
    layout = _layout(site, members, rows)
    dropped = {group: _Dropped(site, group, one, x, rows) for one, group in layout.dropping}
    stacks = layout.stacks(dropped, x, rows)
    blank = x.new_empty(1).expand(x.shape)  # or the mask would keep x
    mask = partial(_mask, blank, dropped, rows) if dropped else None
    if W is not None:
        return all_adapted(y, x, W, stacks, mask)
    compute = products if known else plain_products
    return y + compute(x, stacks, y.shape[-1], mask).to(y.dtype)


def _layout(site: nn.Module, members: Members, rows: Rows) -> "_Layout":
    """That of the last call, where nothing but values has changed since."""
    layout: _Layout | None = rows.kept.get(id(site))
    if layout is None or not (rows.fixed or layout.holds()):
        rows.kept[id(site)] = layout = _Layout(members)
    return layout


class _Layout:
    """What members are, as it was read once. Whether it still is so is asked in every call: of dicts, at C's speed."""

    def __init__(self, members: Members) -> None:
        self.members = members
        self.held, self.trained = [vars(one) for one, _ in members], [one._parameters for one, _ in members]
        self.settings, self.pairs = [*map(SETTINGS, self.held)], [*map(PAIR, self.trained)]
        self.parts = [*itertools.chain.from_iterable(self.pairs)]
        self.dropping = [one for one, (training, p, _) in zip(members, self.settings, strict=True) if training and p]
        self.made: dict[Any, list[Stacks]] = {}

    def holds(self) -> bool:
        now = itertools.chain.from_iterable(map(PAIR, self.trained))
        return all(map(is_, now, self.parts)) and [*map(SETTINGS, self.held)] == self.settings

    def stacks(self, dropped: Mapping[Group, "_Dropped"], x: Tensor, rows: Rows) -> list[Stacks]:
        if torch.is_grad_enabled():  # then comes a step, and of a fused optimizer's the versions do not tell
            for own in itertools.chain.from_iterable(self.made.values()):
                own.forget()
        more = {group: one.enlarged for group, one in dropped.items()}
        key = x.dtype, x.device, *more.values()
        if key not in self.made:
            scales = [one.scale * more.get(group, 1.0) for one, group in self.members]
            self.made[key] = _stacks(self.members, self.pairs, scales, x, rows)
        return self.made[key]


def _stacks(
    members: Members, pairs: list[tuple[Tensor, Tensor]], scales: list[float], x: Tensor, rows: Rows
) -> list[Stacks]:
    ranks: dict[int, list[int]] = {}
    for number, (A, _) in enumerate(pairs):
        ranks.setdefault(1 << (A.shape[0] - 1).bit_length(), []).append(number)
    found = []
    for rank, own in ranks.items():
        units = rows.units(tuple(members[number][1].name for number in own))
        mine = [pairs[number] for number in own], [scales[number] for number in own]
        found.append(Stacks(*mine, rank, units.count, units.slots, units.rows, x, rows.fixed))
    return found


def _mask(x: Tensor, dropped: Mapping[Group, "_Dropped"], rows: Rows) -> Tensor:
    """What the dropout of each group has x times, in the order of the rows; 1 in rows that have none."""
    groups = list(rows.groups.values())
    parts = [dropped[one].mask(x) if one in dropped else torch.ones_like(rows.of(one, x)) for one in groups]
    joined: Tensor = rows.joined(groups, parts)
    return joined


class _Dropped:
    """The dropout of one group, as the adapter alone has it for these rows: each mask is drawn once, or from a seed."""

    def __init__(self, site: nn.Module, group: Group, adapter: Any, x: Tensor, rows: Rows) -> None:
        length = x.shape[1] if group.length is None or x.dim() < 3 else group.length
        self.size = (len(group.rows), length, *x.shape[2:])[: x.dim()]
        self.p, self.A, self.fixed, self.seed, self.enlarged = adapter.dropout, adapter.A, None, 0, 1.0
        with rows.turn(group):
            if kernels.fits(site, x.new_empty(self.size)):
                self.seed, self.enlarged = kernels.seed(self.p), kernels.enlarged(self.p)
            else:
                self.fixed = F.dropout(x.new_ones(self.size), self.p)
        if self.fixed is not None and x.dtype.itemsize < 4:  # 1 / (1 - p) would be another number there
            self.fixed, self.enlarged = (self.fixed != 0).to(x.dtype), 1 / (1 - self.p)

    def mask(self, x: Tensor) -> Tensor:
        if self.fixed is not None:
            return self.fixed
        return kernels.drawn(x.new_empty(self.size), self.A, self.p, self.seed)
