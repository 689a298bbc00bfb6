"""The commit protocol: after a crash anywhere a reader sees all of the old files or all of the new ones."""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from trimtab import CheckpointError
from trimtab.files import CONFIG, WEIGHTS, commit, current, locate


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of commits need not wait for the disk; whether they ask it is tested all the same."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Crash(BaseException):
    pass


class Clock:
    """Raises at one of the steps that change files; after a hard crash at all later ones too, as nothing runs then."""

    def __init__(self, at: int, hard: bool) -> None:
        self.at, self.hard, self.now = at, hard, -1

    def tick(self) -> None:
        self.now += 1
        if self.now == self.at or (self.hard and self.now > self.at):
            raise Crash


@contextmanager
def crashing(at: int, hard: bool) -> Iterator[Clock]:
    """Every step of a commit ticks before it is made."""
    clock = Clock(at, hard)

    def ticking(step: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **kwargs: Any) -> Any:
            clock.tick()
            return step(*args, **kwargs)

        return stepped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", ticking(os.replace))
        patch.setattr(os, "fsync", ticking(os.fsync))
        patch.setattr(Path, "unlink", ticking(Path.unlink))
        yield clock


def writers(text: str, clock: Clock | None = None) -> dict[str, Callable[[Path], None]]:
    def write(path: Path) -> None:
        if clock is None:
            path.write_text(text)
            return
        for written in ("", text[:1], text):
            clock.tick()
            path.write_text(written)
        clock.tick()

    return {CONFIG: write, WEIGHTS: write}


def seen(folder: Path) -> str | None:
    """What a reader gets; fails where the files are not of one commit."""
    found = [
        path.read_text() if path.exists() else None for path in (current(folder, name) for name in (WEIGHTS, CONFIG))
    ]
    assert found[0] == found[1]
    return found[0]


def crash(folder: Path, text: str, at: int, hard: bool) -> bool:
    """Whether the commit came so far that it crashed there."""
    try:
        with crashing(at, hard) as clock:
            commit(folder, writers(text, clock))
    except Crash:
        return True
    return False


def points(crashed_at: Callable[[int], bool]) -> list[int]:
    """Every point at which a commit can crash; the first at which it does not is behind the last."""
    return list(itertools.takewhile(crashed_at, itertools.count()))


@pytest.mark.parametrize("hard", [True, False], ids=["killed", "raised"])
@pytest.mark.parametrize("old", [None, "old"], ids=["new-folder", "over-old"])
def test_a_crash_leaves_the_old_or_the_new(tmp_path: Path, hard: bool, old: str | None) -> None:
    outcomes = []

    def crashed(at: int) -> bool:
        folder = tmp_path / str(at)
        if old:
            commit(folder, writers(old))
        if not crash(folder, "new", at, hard):
            return False
        outcomes.append(seen(folder))
        commit(folder, writers("next"))  # which clears up
        assert seen(folder) == "next"
        assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
        return True

    assert len(points(crashed)) == 4 + 1 + 4 + 1 + 2 + 1  # two writers, each with its fsync; two renames; the folder
    assert outcomes == [old] * 11 + ["new"] * 2  # the first rename is the commit


@pytest.mark.parametrize("old", [None, "old"], ids=["new-folder", "over-old"])
def test_a_crash_while_clearing_up_after_a_crash(tmp_path: Path, old: str | None) -> None:
    def second(first_at: int, at: int) -> bool:
        folder = tmp_path / f"{first_at}-{at}"
        if old:
            commit(folder, writers(old))
        crash(folder, "new", first_at, hard=True)
        before = seen(folder)
        if not crash(folder, "newer", at, hard=True):
            return False
        assert seen(folder) in (before, "newer")
        commit(folder, writers("next"))
        assert seen(folder) == "next"
        return True

    tried = [len(points(lambda at, first_at=first_at: second(first_at, at))) for first_at in range(13)]
    assert max(tried) > min(tried) == 13  # some had something to clear up


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    commit(tmp_path, writers("old"))

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("No space left on device")

    for name in (WEIGHTS, CONFIG):
        with pytest.raises(OSError, match="No space left"):
            commit(tmp_path, {**writers("new"), name: fail})
        assert seen(tmp_path) == "old"
        assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_a_follower_counts_only_once_the_leader_is_gone(tmp_path: Path) -> None:
    commit(tmp_path, writers("old"))
    (tmp_path / f"{CONFIG}.new").write_text("new")
    (tmp_path / f"{WEIGHTS}.new").write_text("new")
    assert seen(tmp_path) == "old"
    os.replace(tmp_path / f"{WEIGHTS}.new", tmp_path / WEIGHTS)
    assert seen(tmp_path) == "new"


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "on the way"
    commit(folder, writers("old"))
    (folder / "README.md").write_text("mine")
    (folder / "notes.new").write_text("mine, too")
    commit(folder, writers("new"))
    assert seen(folder) == "new"
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "notes.new").read_text() == "mine, too"


def test_a_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name" / "second").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate(tmp_path) == tmp_path
    assert locate("org/name") == Path("org/name")  # a folder goes before a hub id of that name
    assert locate("org/name", subfolder="second") == Path("org/name/second")


def test_a_subfolder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / CONFIG).touch()
    with pytest.raises(CheckpointError, match=r"has no folder 'secnod'\. Did you mean 'second'\?$"):
        locate(tmp_path, subfolder="secnod")


@pytest.mark.parametrize("name", ["adapter", "./org/adapter", "/org/adapter", "~/adapter", "a/b/c", ""])
def test_a_path_is_not_asked_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    if name:
        with pytest.raises(CheckpointError, match=r"is no folder\. Give the folder that save_pretrained wrote\.$"):
            locate(name)
    else:
        assert locate(name) == Path()


def test_a_file_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org/adapter").touch()
    with pytest.raises(CheckpointError, match=r"^org/adapter is no folder"):
        locate("org/adapter")


@pytest.mark.parametrize("name", ["org/no-such-adapter", "org/not a name"])
def test_the_hub_offline(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=rf"^{name} is no folder here, and the hub did not give it: \S.*[^\n]+$"):
        locate(name)


def test_what_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter's files, in sub-folders too, and never a pickle."""
    asked = {}

    def download(name: str, **settings: Any) -> str:
        asked.update(settings, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "second").mkdir()
    assert locate("org/adapter", "v2", "second") == tmp_path / "second"
    assert (asked["name"], asked["revision"]) == ("org/adapter", "v2")
    there = [CONFIG, WEIGHTS, f"second/{WEIGHTS}", "adapter_model.bin", "model.safetensors", "tokenizer_config.json"]
    fetched = [CONFIG, WEIGHTS, f"second/{WEIGHTS}", "tokenizer_config.json"]
    assert list(filter_repo_objects(there, allow_patterns=asked["allow_patterns"])) == fetched
