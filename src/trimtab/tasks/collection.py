"""Photos or recordings, many of them: a folder or a .zip with their labels, or a table that names or holds them.

Where a table (csv, tsv, json, jsonl, parquet) inside the folder or .zip, or else beside it, names the files in one of
its columns, the other columns are theirs. Where none does, the folders that they lie in are their labels. Of a table
with a column `split` only the rows count whose split has the name of the folder or .zip, if there are any.

A file is its path, "zip://path::archive", or its bytes. What is zipped is read from there; nothing is unpacked.
"""

import os
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import DataError, did_you_mean
from . import columns, rows
from .columns import Say
from .paths import Source

ZIPPED = "zip://"
SPLIT = "split"

Media = str | bytes


def read(path: Source, endings: Collection[str], split: str, say: Say) -> Any:
    """The files and what is known of each, as a `datasets.Dataset`. Raises: DataError."""
    import datasets

    if not isinstance(path, Path):
        return _named_by(rows.read(path), Path(), endings)
    if not is_collection(path):
        return _named_by(rows.read(path), path, endings)
    inside = _inside(path)
    media = {name: file for name, file in inside.items() if _ending(name) in endings}
    if not media:
        raise DataError(f"{path} holds no files that end in {', '.join(sorted(endings))}.")
    if others := [name for name in inside if name not in media and not _is_table(name)]:
        say(f"{split}: {len(others)} other files in {path.name} left out, such as {others[0]}")
    table = _table(path, inside, media, split, say)
    if table is not None:
        return table
    labels = _folders(path, list(media))
    say(f"{split}: labels are the folders that the {len(media)} files in {path.name} lie in")
    return datasets.Dataset.from_dict({"file": list(media.values()), "label": labels})


def files(path: Path, endings: Collection[str]) -> list[Media]:
    """The files in a folder or .zip, by name. Raises: DataError."""
    return [file for name, file in _inside(path).items() if _ending(name) in endings]


def is_collection(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() == ".zip"


def content(file: Media) -> bytes:
    """What is in a file. Raises: DataError."""
    if isinstance(file, bytes):
        return file
    try:
        if not file.startswith(ZIPPED):
            return Path(file).read_bytes()
        name, _, archive = file.removeprefix(ZIPPED).rpartition("::")
        return _open(archive).read(name)
    except OSError as error:
        raise DataError(f"{title(file)} cannot be read: {error.strerror or error}.") from None
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:  # RuntimeError: a password
        raise DataError(f"{title(file)} cannot be unpacked: {error}.") from None


def title(file: Media) -> str:
    """A file's name for people."""
    if isinstance(file, bytes):
        return f"a file of {len(file)} bytes"
    return file.removeprefix(ZIPPED).rpartition("::")[0] if file.startswith(ZIPPED) else file


@lru_cache(maxsize=8)
def _open(archive: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(archive)


os.register_at_fork(after_in_child=_open.cache_clear)  # two processes would move one place in the file


def _inside(path: Path) -> dict[str, Media]:
    """Relative names and the files, without hidden ones."""
    if path.is_dir():
        found: dict[str, Media] = {
            file.relative_to(path).as_posix(): str(file) for file in path.rglob("*") if file.is_file()
        }
    else:
        found = {PureWindowsPath(name).as_posix(): f"{ZIPPED}{name}::{path}" for name in _members(path)}
    return {name: found[name] for name in sorted(found) if not any(_is_hidden(part) for part in name.split("/"))}


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part in ("__MACOSX", "Thumbs.db")


def _members(path: Path) -> Iterator[str]:
    if not path.is_file():
        beside = [other.name for other in path.parent.glob("*")]
        raise DataError(f"{path} does not exist.{did_you_mean(path.name, beside)}")
    try:
        members = zipfile.ZipFile(path).infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    for member in members:
        name = member.filename
        there = PureWindowsPath(name)  # which takes / and \ for what divides folders
        if there.anchor or ".." in there.parts:
            raise DataError(f"{path} holds a file with the name {name!r}, which leads out of it. It is not read.")
        if not member.is_dir():
            yield name


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _is_table(name: str) -> bool:
    return _ending(name.lower().removesuffix(".gz")) in rows.FORMATS


def _folders(path: Path, names: list[str]) -> list[str]:
    """The outermost folder in which not all files lie; "" for those in none."""
    parts = [name.split("/")[:-1] for name in names]
    while all(parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    labels = [part[0] if part else "" for part in parts]
    if not any(labels):
        raise DataError(
            f"{path}: nothing says what its {len(names)} files are. Put them into a folder for each label, or a table "
            f"(csv, with columns such as file and label) into it or beside it."
        )
    return labels


def _table(path: Path, inside: dict[str, Media], media: dict[str, Media], split: str, say: Say) -> Any:
    """The rows of the one table that names the files, with the files in place of their names."""
    found = [(name, _zipped_table(name, file)) for name, file in inside.items() if _is_table(name)]
    named = [(name, table, *hit) for name, table in found if (hit := _match(table, media))]
    if not named:
        beside = sorted(other for other in path.parent.glob("*") if other.is_file() and _is_table(other.name))
        own = [other for other in beside if other.name.split(".")[0] == path.stem]
        for some in (own, [other for other in beside if other not in own]):
            found = [(other.name, table) for other in some if (table := _readable(other, split, say)) is not None]
            if named := [(name, table, *hit) for name, table in found if (hit := _match(table, media))]:
                break
    if not named:
        return None
    if len(named) > 1:
        names = " and ".join(name for name, *_ in named)
        raise DataError(f"{names} name files in {path}. Leave one of them there, or call it {path.stem}.csv.")
    [(name, table, column, hits)] = named
    chosen = list(range(len(table)))
    which = ""
    key = next((key for key in table.column_names if key.lower() == SPLIT), None)
    if key is not None:
        splits = [columns.text(value, table.features[key]) for value in table[key]]
        if path.stem in splits:
            chosen = [i for i in chosen if splits[i] == path.stem]
            which = f", of the rows with {key} {path.stem}"
        else:
            which = f", of all rows: no {key} is called {path.stem}"
    kept = [i for i in chosen if hits[i] is not None]
    first: dict[str, int] = {}
    for i in kept:
        if (before := first.setdefault(hits[i], i)) != i:
            raise DataError(f"{name} names {hits[i]} in {path.name} twice, in row {before + 1} and in row {i + 1}.")
    say(f"{split}: {len(kept)} of {len(media)} files in {path.name} are named by {column} in {name}{which}")
    if missing := [i for i in chosen if hits[i] is None]:
        say(f"{split}: {len(missing)} rows of {name} name no file in {path.name}: {table[missing[0]][column]}, ...")
    rest = table.select(kept).remove_columns(column)
    return rest.add_column(column, [media[hits[i]] for i in kept])


def _zipped_table(name: str, file: Media) -> Any:
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / PurePosixPath(name).name
        plain.write_bytes(content(file))
        return rows.read(plain)


def _readable(path: Path, split: str, say: Say) -> Any:
    """A file beside may be anything."""
    try:
        return rows.read(path)
    except DataError as error:
        say(f"{split}: not looked for labels in {path.name}: {error}")
        return None


def _match(table: Any, media: dict[str, Media]) -> tuple[str, list[Any]] | None:
    """The column that names most files, and the name of each row's file: its path, the end of it, or without ending."""
    ends: dict[str, set[str]] = {}
    for name in media:
        parts = name.split("/")
        for start in range(len(parts)):
            end = "/".join(parts[start:])
            ends.setdefault(end, set()).add(name)
            ends.setdefault(end.removesuffix(PurePosixPath(end).suffix), set()).add(name)
    best, most = None, 0
    for column, feature in table.features.items():
        if getattr(feature, "dtype", "") not in ("string", "large_string", "int64"):
            continue
        hits = [_hit(columns.text(value), media, ends) for value in table[column]]
        count = len({hit for hit in hits if hit})
        if count > most:
            best, most = (column, hits), count
    return best


def _hit(value: str, media: dict[str, Media], ends: dict[str, set[str]]) -> str | None:
    value = value.replace("\\", "/").removeprefix("./")
    if value in media:
        return value
    if len(found := ends.get(value, set())) == 1:
        return next(iter(found))
    parts = value.split("/")  # of a file train/cats/1.jpg, cats/1.jpg may be zipped
    return next((end for start in range(1, len(parts)) if (end := "/".join(parts[start:])) in media), None)


def _named_by(table: Any, path: Path, endings: Collection[str]) -> Any:
    """A table that is given itself: its files' paths are relative to it, or their bytes are in it.

    Raises:
        DataError: a file that is not there.
    """
    import datasets

    best, most = "", 0
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio):
            table = table.cast_column(column, type(feature)(decode=False))
            feature = {"bytes": None, "path": None}
        if isinstance(feature, dict) and "bytes" in feature:
            held = [cell and (cell["bytes"] or _beside(path, cell["path"])) for cell in table[column]]
            table = table.remove_columns(column).add_column(column, held)
        elif getattr(feature, "dtype", "") in ("string", "large_string"):
            named = sum(_ending(value or "") in endings for value in table[column])
            best, most = (column, named) if named > most else (best, most)
    if not most:
        return table
    found = [value and _beside(path, value) for value in table[best]]
    for value, file in zip(table[best], found, strict=True):
        if file and not Path(file).is_file():
            raise DataError(f"{path} names {value}, but there is no file {file}.")
    return table.remove_columns(best).add_column(best, found)


def _beside(table: Path, name: str) -> str:
    return str(table.parent / name)
