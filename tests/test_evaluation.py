"""Evaluating finished runs: the scores that the run wrote, and intervals that cover what they should."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import review, trimtab, write_csv, write_recipe

from trimtab import evaluation, run
from trimtab import recipe as recipes
from trimtab.evaluation import evaluate, measure
from trimtab.training import train


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    return train(recipes.read(write_recipe(folder, bert)), lambda _: None).folder


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def without_loss(scores: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if name != "loss"}


def test_the_scores_are_those_of_the_run(done: Path, bert: Path, tmp_path: Path) -> None:
    metrics = json.loads((done / "metrics.json").read_text(encoding="utf-8"))
    found = evaluate(done, say=lambda _: None)
    assert found.scores == without_loss(metrics["test"])
    assert found.rows == 8
    plain = write_recipe(tmp_path, bert)
    result = train(recipes.read(plain, ["data.test=", "training.epochs=1"]), lambda _: None)
    assert evaluate(result.folder, say=lambda _: None).scores == without_loss(result.metrics["validation"])


def test_rows_of_a_file_need_the_columns_trained_on(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_csv(tmp_path / "more.csv", [review(i) for i in range(40, 60)])
    assert trimtab("evaluate", done, "--file", rows, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["rows"] == 20
    asked = [review(i)[0] for i in range(40, 60)]
    loaded = run.load(done)
    right = [
        answer["label"] == review(i)[1]
        for i, answer in zip(range(40, 60), loaded.task.predict(loaded.model, asked), strict=True)
    ]
    assert shown["scores"]["accuracy"] == sum(right) / 20
    low, high = shown["intervals"]["accuracy"]
    assert low <= shown["scores"]["accuracy"] <= high
    write_csv(tmp_path / "other.csv", [review(0)], ("words", "label"))
    assert trimtab("evaluate", done, "--file", tmp_path / "other.csv") == 2
    assert "has no column 'text'. It has: words, label" in capsys.readouterr().err
    write_csv(tmp_path / "strange.csv", [("good", "neither")])
    assert trimtab("evaluate", done, "--file", tmp_path / "strange.csv") == 2
    assert "strange.csv: the label 'neither' is none that was trained on: blame, praise" in capsys.readouterr().err
    assert trimtab("evaluate", tmp_path) == 2


def test_rows_that_changed_since_are_said(tmp_path: Path, bert: Path) -> None:
    done = train(recipes.read(write_recipe(tmp_path, bert), ["training.epochs=1"]), lambda _: None).folder
    said: list[str] = []
    evaluate(done, say=said.append)
    assert said == ["The test rows of the run"]
    write_csv(tmp_path / "test.csv", [review(i) for i in range(50, 60)])
    assert evaluate(done, say=said.append).rows == 10
    assert said[1] == f"{tmp_path / 'test.csv'} has changed since the run."


def measured(finished: Path, metrics: Any, **columns: list[Any]) -> Any:
    """What `measure` finds with the scores of another task."""
    import datasets

    found = run.load(finished)
    size = len(next(iter(columns.values())))
    rows = datasets.Dataset.from_dict({**found.task.tokenized(["good"] * size), "labels": [0] * size, **columns})
    collate = lambda batch: found.task.collate([{k: v for k, v in row.items() if k not in columns} for row in batch])  # noqa: E731
    task = SimpleNamespace(metrics=metrics, collate=collate, reduced=found.task.reduced, generates=False)
    return measure(SimpleNamespace(recipe=found.recipe, task=task, model=found.model), rows)  # type: ignore[arg-type]


def test_intervals_are_about_two_standard_errors(finished: Path) -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    found = measured(finished, lambda _, rows: {"mean": float(np.mean(rows["value"]))}, value=values)
    low, high = found.intervals["mean"]
    wanted = 1.96 * np.std(values) / math.sqrt(400)  # of a mean, by the central limit theorem
    assert found.scores["mean"] == pytest.approx(np.mean(values))
    assert low == pytest.approx(np.mean(values) - wanted, abs=wanted / 4)
    assert high == pytest.approx(np.mean(values) + wanted, abs=wanted / 4)


def test_a_row_in_several_windows_is_drawn_whole_and_counts_once_a_draw(finished: Path) -> None:
    rows, windows = [0, 0, 0, 1, 2, 2], {0: 3, 1: 1, 2: 2}

    def metrics(_: Any, drawn: Any) -> dict[str, float]:
        each = {number: drawn["kind"][drawn["row"].index(number)] for number in set(drawn["row"])}
        assert all(drawn["row"].count(number) == windows[kind] for number, kind in each.items())
        return {"rows": len(each)}

    found = measured(finished, metrics, row=rows, kind=rows)
    assert found.rows == 3
    assert found.samples["rows"] == [3] * evaluation.RESAMPLES
