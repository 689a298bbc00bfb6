"""Rows that are better not trained on. Only training rows are dropped: scores stay those of the rows that were given.

Rows are equal where their cells are, letter by letter. Duplicates and conflicts are looked for before a fraction is set
aside for validation, so that of the same text one part is not learned and another one scored.
"""

import textwrap
from collections.abc import Collection
from typing import Any, Literal

from ..errors import DataError
from .columns import Cells, Say

Reason = Literal["duplicate", "conflicting", "leaked", "too_long"]
SAID = {
    "duplicate": "that are there before",
    "conflicting": "whose inputs are there with another answer",
    "leaked": "whose inputs are also held out",
    "too_long": "that would be cut",
}


def without(cells: Cells, dropped: Collection[int], reason: Reason, say: Say) -> Cells:
    """The training rows but some. Raises: DataError, where none is left."""
    size = len(next(iter(cells.values())))
    if dropped:
        say(f"train: {len(dropped)} of {size} rows dropped {SAID[reason]}, such as {sample(cells, min(dropped))}")
    if len(dropped) == size:
        raise DataError(f"data.drop: {reason} leaves no row to train on.")
    return {name: [value for i, value in enumerate(values) if i not in dropped] for name, values in cells.items()}


def duplicate(cells: Cells) -> set[int]:
    """The rows that are there before."""
    seen: set[str] = set()
    keys = _keys(cells)
    return {i for i, key in enumerate(keys) if key in seen or seen.add(key)}  # type: ignore[func-returns-value]


def conflicting(cells: Cells, answer: str) -> set[int]:
    """The rows with the inputs of another one, but another answer."""
    answers: dict[str, set[str]] = {}
    inputs = _keys(cells, answer)
    for key, value in zip(inputs, cells[answer], strict=True):
        answers.setdefault(key, set()).add(repr(value))
    return {i for i, key in enumerate(inputs) if len(answers[key]) > 1}


def leaked(cells: Cells, held_out: dict[str, Cells], answer: str, say: Say) -> set[int]:
    """The training rows whose inputs are also held out, which is said in any case: scores on such rows tell little."""
    inputs = _keys(cells, answer)
    known = set(inputs)
    found: set[str] = set()
    for split, others in held_out.items():
        keys = _keys(others, answer)
        if both := [i for i, key in enumerate(keys) if key in known]:
            say(f"{split}: the inputs of {len(both)} of {len(keys)} rows are also trained on, such as "
                f"{sample(others, both[0])}")  # fmt: skip
            found.update(keys[i] for i in both)
    return {i for i, key in enumerate(inputs) if key in found}


def sample(cells: Cells, i: int) -> str:
    """A row for people."""
    return repr(textwrap.shorten(" / ".join(str(values[i]) for values in cells.values()), 80, placeholder=" ..."))


def _keys(cells: Cells, but: str = "") -> list[str]:
    """Of each row what makes it equal to others: cells may be lists and mappings."""
    columns: list[list[Any]] = [values for name, values in cells.items() if name != but]
    return [repr(row) for row in zip(*columns, strict=True)]
