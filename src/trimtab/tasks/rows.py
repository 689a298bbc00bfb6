"""Read a data file, csv, tsv, json, jsonl or parquet, each also gzipped, through `datasets`."""

import gzip
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .. import watch
from ..errors import DataError, did_you_mean
from .paths import HubDataset, Source

# `na_filter`: the words "None", "NA" and "null" in a cell are text, not gaps.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"na_filter": False}),
    ".tsv": ("csv", {"na_filter": False, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}


def read(path: Source) -> Any:
    """The rows of a file as a `datasets.Dataset` in memory; nothing is left in a cache but datasets of the hub.

    Raises:
        DataError: no such file, an unknown format, rows that cannot be read, or none.
    """
    if isinstance(path, HubDataset):
        return _downloaded(path)
    _check_there(path)
    suffix = next((end for end in reversed(path.suffixes) if end != ".gz"), "")
    if suffix.lower() not in FORMATS:
        raise DataError(f"{path} is of no known format; known are {', '.join(FORMATS)}, each also with .gz.")
    import datasets

    kind, settings = FORMATS[suffix.lower()]
    try:
        with watch.busy(f"Reading {path.name}"), tempfile.TemporaryDirectory() as scratch:
            plain = Path(scratch) / f"rows{suffix}"
            _put(path.absolute(), plain)
            rows = datasets.load_dataset(
                kind, data_files=str(plain), split="train", cache_dir=scratch, keep_in_memory=True, **settings
            )
    except Exception as error:  # each reader raises its own kinds
        reason = _reason(error)
        if "corresponds to no data" in reason:  # what datasets says of a header alone
            raise DataError(f"{path} holds no rows.") from None
        raise DataError(f"{path} cannot be read: {reason}") from None
    if kind == "csv" and len(rows.column_names) == 1 and (found := {";", "\t", "|"} & {*rows.column_names[0]}):
        raise DataError(
            f"{path} has one column, {rows.column_names[0]!r}. Are {found.pop()!r} what parts them? "
            "Columns of a .csv are parted by commas, of a .tsv by tabs."
        )
    return rows


def _downloaded(source: HubDataset) -> Any:
    import datasets

    try:
        with watch.busy(f"Reading {source}"):
            return datasets.load_dataset(**source.model_dump())
    except Exception as error:  # of the hub, of the network, of its readers
        raise DataError(f"The dataset {source} cannot be loaded: {_reason(error)}") from None


def document(path: Path) -> Any:
    """A text file as one row with one column, "text". Raises: DataError."""
    import datasets

    _check_there(path)
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {_reason(error)}") from None
    return datasets.Dataset.from_dict({"text": [text]})


def lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises: DataError."""
    _check_there(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {_reason(error)}") from None
    return [line for line in text.splitlines() if line.strip()]


def _check_there(path: Path) -> None:
    if not path.is_file():
        what = "is a folder; give a file" if path.is_dir() else "does not exist"
        beside = [other.name for other in path.parent.glob("*") if other.is_file()]
        raise DataError(f"{path} {what}.{did_you_mean(path.name, beside)}")


def _put(path: Path, plain: Path) -> None:
    """Link the file under a plain name (`datasets` takes [, * and ? for patterns), or unpack it there."""
    if path.suffix != ".gz":
        plain.symlink_to(path)
        return
    with gzip.open(path) as packed, plain.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # datasets says only that generation failed
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        encoding = "UTF-16" if error.start == 0 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
        return f"it is not UTF-8 (byte {error.start}). Convert it: iconv -f {encoding} -t UTF-8."
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
