"""Comparing methods: which trainings that takes, which learning rate counts, and what is done only once."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import review, trimtab, write_csv, write_recipe

from trimtab import comparison
from trimtab import recipe as recipes
from trimtab.comparison import Trial, compare, methods_of, trials
from trimtab.errors import ConfigError
from trimtab.methods import METHODS
from trimtab.training import train

BENCHMARK = Path(__file__).parents[1] / "docs" / "benchmarks" / "methods.json"


def test_the_beginning_of_a_name_will_do() -> None:
    assert methods_of("lora, prefix,prompt,lora") == ["lora", "prefix_tuning", "prompt_tuning"]
    with pytest.raises(ConfigError, match=r"no method 'pr'\. It could be: prefix_tuning, prompt_tuning"):
        methods_of("lora,pr")
    with pytest.raises(ConfigError, match=r"no method 'lorra'. Did you mean 'lora'"):
        methods_of("lorra")
    with pytest.raises(ConfigError, match="Name methods, of these: adalora, "):
        methods_of(" , ")


def test_the_trainings(recipe: Path, tmp_path: Path) -> None:
    found = trials(recipes.read(recipe), ["lora", "prompt_tuning"], 3, [0, 7], tmp_path)
    times = METHODS["prompt_tuning"].relative_rate
    rates = [0.0025, 0.01, 0.04]  # the recipe's is 0.01
    assert [(trial.method, trial.seed) for trial in found] == [
        (m, s) for m in ("lora", "prompt_tuning") for _ in rates for s in (0, 7)
    ]
    assert [trial.rate for trial in found[::2]] == pytest.approx([*rates, *(rate * times for rate in rates)], rel=1e-2)
    for trial in found:
        assert trial.recipe.training["learning_rate"] == trial.rate
        assert trial.recipe.training["seed"] == trial.seed
        assert trial.recipe.training["num_train_epochs"] == 2
    assert found[0].recipe.method == {"name": "lora", "r": 2, "target_modules": ["query", "value"]}  # as in the recipe
    assert found[-1].recipe.method == {"name": "prompt_tuning"}
    assert len({trial.recipe.output for trial in found}) == 12


def test_rates_are_those_of_the_benchmark() -> None:
    rows = json.loads(BENCHMARK.read_text(encoding="utf-8"))["rows"]
    named = {"full fine-tuning": "full"}  # measured without trimtab
    found = [(named.get(row["name"], row["method"]), row["learning_rate"]) for row in reversed(rows)]
    best = {method: rate for method, rate in found if method}  # of variants the first
    for method, rate in best.items():
        assert METHODS[method].relative_rate == pytest.approx(rate / best["lora"]), method


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    write_csv(folder / "train.csv", [review(i) for i in range(24)])
    return train(recipes.read(write_recipe(folder, bert), ["data.test="]), lambda _: None).folder


def pretended(monkeypatch: pytest.MonkeyPatch, finished: Path, scores: dict[str, float]) -> list[str]:
    """Let trainings be copies of one, with these validation scores by name."""
    done: list[str] = []

    def pretend(trial: Trial) -> str:
        shutil.copytree(finished, trial.recipe.output)
        path = trial.recipe.output / "metrics.json"
        metrics = json.loads(path.read_text(encoding="utf-8"))
        metrics["validation"]["accuracy"] = scores[trial.name]
        path.write_text(json.dumps(metrics), encoding="utf-8")
        done.append(trial.name)
        return ""

    monkeypatch.setattr(comparison, "_train", pretend)
    return done


def test_the_best_learning_rate_counts(
    recipe: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = trials(recipes.read(recipe, ["data.test="]), ["lora", "ia3"], 3, [0], tmp_path / "out")
    scores = dict(zip([trial.name for trial in todo], (0.6, 0.8, 0.7, 0.5, 0.6, 0.9), strict=True))
    done = pretended(monkeypatch, finished, scores)
    found = compare(todo, tmp_path / "out", lambda _: None)
    assert done == list(scores)
    by_method = {row.method: row for row in found.rows}
    assert by_method["lora"].learning_rate == todo[1].rate
    assert not by_method["lora"].at_the_end
    assert by_method["ia3"].learning_rate == todo[5].rate
    assert by_method["ia3"].at_the_end
    metrics = json.loads((finished / "metrics.json").read_text(encoding="utf-8"))
    for row in found.rows:  # each is a copy of one run, without test rows
        assert row.score == metrics["validation"]["accuracy"]
        assert row.low <= row.score <= row.high
        assert row.trainable_parameters == metrics["trainable_parameters"]
        assert row.latency > 0
    assert found.split == "validation"
    page = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "these rows, which makes it a little too good" in page
    assert f"{todo[5].rate:g} *" in page
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_methods_are_trained_once_and_those_that_do_not_fit_say_why(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("compare", recipe, "--methods", "lora,trainable", "--tries", "1")
    assert trimtab(*arguments) == 0
    shown = capsys.readouterr().out
    folder = recipe.parent / "run-compared"
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    lora, tokens = found["rows"]
    assert "no token is chosen" in tokens["failed"]
    assert f"trainable_tokens was not trained: {tokens['failed']}" in shown
    metrics = json.loads((folder / "lora-0.01-0" / "metrics.json").read_text(encoding="utf-8"))
    assert lora["score"] == metrics["test"]["accuracy"]
    assert lora["seconds"] == metrics["seconds"]
    assert shown.count("lora-0.01-0: validation accuracy") == 1
    before = (folder / "lora-0.01-0" / "metrics.json").stat().st_mtime_ns
    assert trimtab(*arguments) == 0
    assert (folder / "lora-0.01-0" / "metrics.json").stat().st_mtime_ns == before
    assert trimtab("compare", recipe, "--methods", "lora", "--seeds", "one") == 2
    assert "write whole numbers" in capsys.readouterr().err
