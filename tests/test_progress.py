"""What long steps show: a bar for each on a terminal, nothing on a pipe."""

import contextvars
import io
from pathlib import Path

import pytest
from conftest import write_csv
from rich.console import Console
from transformers import AutoTokenizer

from trimtab import recipe as recipes
from trimtab import run, watch
from trimtab.evaluation import evaluate
from trimtab.progress import ProgressBar
from trimtab.tasks import text
from trimtab.training import train


def shown(recipe: Path, terminal: bool) -> str:
    """What a training, an evaluation and a merge write to a console."""
    console = Console(file=io.StringIO(), force_terminal=terminal, force_interactive=terminal, width=120)

    def work() -> None:
        bar = ProgressBar(console)
        folder = train(recipes.read(recipe), lambda _: None, [bar]).folder
        evaluate(folder, say=lambda _: None, callbacks=[bar])
        run.merge(folder, folder / "merged")
        assert not bar.bar.live.is_started

    contextvars.Context().run(work)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_every_long_step_has_a_bar(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PART", 5)
    written = shown(recipe, True)
    for step in ("Reading train.csv", "Tokenizing", "Loading the model", "Trying the longest batch", "Evaluating",
                 "Training", "Resampling", "Merging"):  # fmt: skip
        assert step in written


def test_a_pipe_gets_lines_only(recipe: Path) -> None:
    lines = shown(recipe, False).splitlines()
    assert len(lines) == 2  # one for each epoch
    assert all(line.startswith("epoch ") for line in lines)


def test_a_step_that_fails_leaves_no_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True)

    def work() -> None:
        bar = ProgressBar(console)
        with pytest.raises(ValueError, match="no"), watch.busy("Thinking"):
            raise ValueError("no")
        assert not bar.bar.live.is_started
        assert [task.description for task in bar.bar.tasks if task.visible] == []

    contextvars.Context().run(work)


def test_texts_are_tokenized_alike_in_parts(bert: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from trimtab.tasks import TASKS, Data

    path = write_csv(tmp_path / "a.csv", [(f"the film was {'very ' * n}good", n % 2) for n in range(40)])
    data = Data(train=path, validation=path, max_length=8)
    said: list[list[str]] = []
    found = []
    for part in (1000, 7):
        monkeypatch.setattr(text, "PART", part)
        said.append([])
        _, rows = TASKS["text-classification"].from_data(data, str(bert), 0, lambda line: said[-1].append(str(line)))
        found.append(rows["train"].to_dict())
    assert found[0] == found[1]
    assert said[0] == said[1]
    tokenizer = AutoTokenizer.from_pretrained(bert)
    assert (
        found[1]["input_ids"][39] == tokenizer("the film was " + "very " * 39, max_length=8, truncation=True).input_ids
    )
