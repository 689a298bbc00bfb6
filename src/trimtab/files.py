"""A few files in a folder, replaced as one: after a crash a reader sees all of the old or all of the new ones.

Two renames are not one, so the first renamed file marks the commit: each new file is first written beside the
old one as NAME.new, the leader first; renaming the leader is the commit; the others follow. Hence a follower's
.new counts if and only if the leader's is gone.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from .errors import CheckpointError, did_you_mean

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LEADER = WEIGHTS


def _new(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def current(folder: Path, name: str) -> Path:
    """Where the valid version of a file lies; it need not exist."""
    new = _new(folder / name)
    return new if new.exists() and not _new(folder / LEADER).exists() else folder / name


def commit(folder: Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Replace the files `writers` names, among them the leader, each by what its writer writes to a path."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(writers, key=lambda name: name != LEADER)
    _settle(folder, names)
    try:
        for name in names:
            writers[name](_new(folder / name))
            with _new(folder / name).open("rb") as written:
                os.fsync(written.fileno())
    except BaseException:
        _settle(folder, names)
        raise
    for name in names:
        os.replace(_new(folder / name), folder / name)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _settle(folder: Path, names: list[str]) -> None:
    """Finish, or undo, what an earlier writer left behind."""
    committed = not _new(folder / LEADER).exists()
    for name in reversed(names):  # the leader last: while its .new exists the others' do not count
        if _new(folder / name).exists():
            if committed:
                os.replace(_new(folder / name), folder / name)
            else:
                _new(folder / name).unlink()


def locate(folder_or_id: str | Path, revision: str | None = None, subfolder: str = "") -> Path:
    """The folder of an adapter: itself where it exists, else fetched from the Hugging Face hub by its id.

    Raises:
        CheckpointError: neither a folder nor a hub id that can be fetched (or is cached, when offline); no such
            folder in it.
    """
    folder = Path(folder_or_id)
    if not folder.is_dir():
        folder = _fetch(str(folder_or_id), revision)
    if not (folder / subfolder).is_dir():
        there = [path.parent.name for path in folder.glob(f"*/{CONFIG}")]
        raise CheckpointError(f"{folder_or_id} has no folder {subfolder!r}.{did_you_mean(subfolder, there)}")
    return folder / subfolder


def _fetch(name: str, revision: str | None) -> Path:
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name} is no folder. Give the folder that save_pretrained wrote.")
    import huggingface_hub  # takes 0.1 s to import

    try:
        found = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=["*.json", f"*{WEIGHTS}"])
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name} is no folder here, and the hub did not give it: {reason}") from None
    return Path(found)
