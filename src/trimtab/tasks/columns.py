"""From the columns of a file to the columns of a task: which is which, what a cell holds, which rows are dropped."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import DataError

Say = Callable[[Any], object]  # tells the user one thing: a line, or one of rich's texts
Cells = dict[str, list[Any]]  # values by the task's names of the columns

TYPES = ("token", "token_seq", "float", "float_seq")  # with which tables of ratings name columns: "item_id:token"


def complete(found: Any, data: Any, usual: Mapping[str, Iterable[str]], optional: Iterable[str]) -> dict[str, str]:
    """data.columns, with the columns that it does not name, by their usual names; in the task's order.

    Raises:
        DataError: a named column that is not there, or no column of a usual name.
    """
    there = ", ".join(found.column_names)
    for name, column in data.columns.items():
        if column not in found.column_names:
            raise DataError(f"{data.train} has no column {column!r} (data.columns.{name}). It has: {there}.")
    free = [column for column in found.column_names if column not in data.columns.values()]
    typed = {name.lower(): column for column in free for name, _, kind in [column.partition(":")] if kind in TYPES}
    lowered = typed | {column.lower(): column for column in free}
    guessed: dict[str, str] = {}
    for name, words in usual.items():
        hit = next((lowered[word] for word in words if word in lowered), None)
        if name in data.columns:
            continue
        if hit is not None:
            guessed[name] = hit
            lowered = {word: column for word, column in lowered.items() if column != hit}
        elif name not in optional:
            needed = ", ".join(f"{name}: ..." for name in usual if name not in optional)
            hint = f"data: {{columns: {{{needed}}}}}"
            raise DataError(f"{data.train}: which column is the {name}? It has: {there}. Say so in the recipe, {hint}")
    both = {**data.columns, **guessed}
    return {name: both[name] for name in usual if name in both}


def check(path: Any, found: Any, wanted: Iterable[str]) -> None:
    for column in wanted:
        if column not in found.column_names:
            raise DataError(f"{path} has no column {column!r}. It has: {', '.join(found.column_names)}.")


def clean(
    path: Any,
    found: Any,
    names: Mapping[str, str],
    cell: Callable[[str, Any, Any], Any],
    needed: list[str],
    split: str,
    say: Say,
) -> Cells:
    """The rows that lack nothing, by the task's names of the columns."""
    check(path, found, names.values())
    cells: Cells = {}
    for name, column in names.items():
        try:
            cells[name] = [cell(name, value, found.features[column]) for value in found[column]]
        except DataError as error:
            raise DataError(f"{path}, column {column!r}: {error}") from None
    kept = [i for i in range(len(found)) if all(cells[name][i] for name in needed)]
    dropped = len(found) - len(kept)
    say(f"{split}: {len(found)} rows read, {len(kept)} kept" + (f", {dropped} empty dropped" if dropped else ""))
    if not kept:
        raise DataError(f"{path}: no row has {'both ' * (len(needed) == 2)}{' and '.join(needed)}.")
    return {name: [values[i] for i in kept] for name, values in cells.items()}


def text(value: Any, feature: Any = None) -> str:
    """A cell as text: class numbers by their names, numbers as they were written, what is missing as ''.

    Raises:
        DataError: a cell with several values.
    """
    if isinstance(value, dict | list):
        raise DataError(f"A cell holds {str(value)[:80]!r}, which is neither a text nor a number.")
    if hasattr(feature, "int2str"):  # parquet files can hold class numbers with their names
        return str(feature.int2str(int(value))) if value is not None else ""
    if isinstance(value, float):
        return "" if value != value else f"{value:g}"  # a column of numbers with a gap is read as floats
    return "" if value is None else str(value).strip()


def split(found: Cells, fraction: float, seed: int) -> tuple[Cells, Cells]:
    """Two parts with the same share of each label; without, where there are none or one is too rare for that."""
    from sklearn.model_selection import train_test_split

    everything = range(len(next(iter(found.values()))))
    labels = found.get("label")
    try:
        try:
            parts = train_test_split(everything, test_size=fraction, random_state=seed, stratify=labels)
        except ValueError:
            parts = train_test_split(everything, test_size=fraction, random_state=seed)
    except ValueError:
        raise DataError(f"{len(everything)} rows are too few to set {fraction:g} aside for validation.") from None
    first, second = ({name: [values[i] for i in part] for name, values in found.items()} for part in parts)
    return first, second
