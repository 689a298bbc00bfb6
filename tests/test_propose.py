"""Recipes from a look at the data: which task they are for, which layers are adapted, and that such a recipe runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import review, trimtab, write_csv
from PIL import Image

from trimtab import guess, propose
from trimtab import recipe as recipes
from trimtab.errors import ConfigError, DataError
from trimtab.methods import METHODS
from trimtab.outline import outline
from trimtab.tasks import Data

ROWS: dict[str, list[dict[str, Any]]] = {
    "classes": [{"text": review(i)[0], "label": review(i)[1]} for i in range(24)],
    "pairs": [{"sentence1": "good", "sentence2": "fine", "label": i % 2} for i in range(24)],
    "words": [{"tokens": ["the", "film"], "ner_tags": ["O", "B-FILM"]} for _ in range(24)],
    "answers": [{"question": "good ?", "context": "good", "answers": {"text": ["good"], "answer_start": [0]}}] * 24,
    "prompts": [{"instruction": "film ?", "output": f"good {i}"} for i in range(24)],
    "texts": [{"quote": f"the film was good {i}"} for i in range(24)],
    "chats": [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]}] * 24,
    "other": [{"a": 1, "b": 2}] * 24,
    "prices": [{"text": f"film {i}", "price": 9.5 + i} for i in range(24)],
    "stars": [{"user": f"u{i % 4}", "item": f"i{i % 5}", "rating": i % 5} for i in range(24)],
    "shelves": [{"items": ["a", "b", "c"]} for _ in range(24)],
    "free": [{"text": f"the film {i}", "target": f"the film was good {i}"} for i in range(24)],
}


@pytest.fixture
def rows(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[request.param]), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("rows", "model", "task"),
    [
        ("classes", "bert", "text-classification"),
        ("classes", "llama", "text-classification"),  # two columns are more than the one of a text
        ("pairs", "bert", "text-classification"),
        ("prices", "bert", "text-regression"),
        ("stars", "bert", "rating-prediction"),
        ("shelves", "bert", "next-item"),
        ("words", "bert", "token-classification"),
        ("answers", "bert", "question-answering"),
        ("prompts", "llama", "text-generation"),
        ("texts", "llama", "text-generation"),
        ("chats", "llama", "text-generation"),
        ("free", "llama", "text-generation"),  # its targets are no classes
    ],
    indirect=["rows"],
)
def test_the_task_is_guessed(rows: Path, model: str, task: str, request: pytest.FixtureRequest) -> None:
    assert guess.task_of(Data(train=rows), str(request.getfixturevalue(model))) == task


@pytest.mark.parametrize("rows", ["other"], indirect=True)
def test_rows_for_no_task_say_what_is_missing(rows: Path, bert: Path) -> None:
    with pytest.raises(DataError, match=r"none of the tasks.*text-classification: .*which column is the text.*a, b"):
        guess.task_of(Data(train=rows), str(bert))


def test_a_file_that_is_not_there_is_said_once(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(DataError, match=r"rows.csv does not exist") as raised:
        guess.task_of(Data(train=tmp_path / "rows.csv"), str(bert))
    assert str(raised.value).count("does not exist") == 1


def configured(folder: Path, **config: Any) -> str:
    """The folder of a model of which there is nothing but the config."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def test_photos_are_for_models_that_see(tmp_path: Path, bert: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), name).save(tmp_path / "photos" / name / f"{i}.png")
    data = Data(train=tmp_path / "photos")
    assert guess.task_of(data, configured(tmp_path / "vit", model_type="vit")) == "image-classification"
    with pytest.raises(DataError, match="is a folder; give a file"):
        guess.task_of(data, str(bert))


def test_a_model_without_a_task_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a vits model, for which there is no task: text-classification, "):
        guess.task_of(Data(train=tmp_path / "rows.csv"), configured(tmp_path / "vits", model_type="vits"))


def test_layers_without_a_usual_name_are_named(tmp_path: Path, bert: Path) -> None:
    resnet = configured(tmp_path / "resnet", model_type="resnet", depths=[1], hidden_sizes=[8], embedding_size=8)
    xlnet = configured(tmp_path / "xlnet", model_type="xlnet", n_layer=1, d_model=8, n_head=2, d_inner=8)
    methods = [propose._method(outline(model)) for model in (resnet, xlnet, str(bert))]
    assert methods[0] == {"name": "lora", "r": 8, "target_modules": ["convolution"]}
    assert methods[1] == {"name": "lora", "r": 8, "target_modules": ["layer_1", "layer_2"]}
    assert methods[2] == {"name": "lora", "r": 8}


def test_init_writes_a_recipe_that_is_the_rows_own(
    tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "my reviews: all.csv", [(*review(i), i) for i in range(24)], ("words, said", "label", "n"))
    assert trimtab("init", "my reviews: all.csv", "--model", bert) == 2
    assert "which column is the text" in capsys.readouterr().err
    write_csv(tmp_path / "my reviews: all.csv", [(*review(i), i) for i in range(24)], ("text", "label", "n"))
    assert trimtab("init", "my reviews: all.csv", "--model", bert) == 0
    text = (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    assert "# train: 24 rows read, 24 kept" in text
    assert "# Columns guessed: text is the text, label is the label" in text
    found = recipes.read(tmp_path / "recipe.yaml")
    assert found.task == "text-classification"
    assert found.data.train == tmp_path / "my reviews: all.csv"
    assert found.data.columns == {"text": "text", "label": "label"}
    assert found.output == tmp_path / "runs" / "my reviews: all"
    assert found.training["num_train_epochs"] == 20  # 24 rows are few
    assert trimtab("init", "my reviews: all.csv", "--model", bert) == 2
    assert "recipe.yaml exists already" in capsys.readouterr().err


def test_data_and_a_model_are_enough(
    tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "reviews.csv", [review(i) for i in range(40)])
    settings = ["--set", "training.learning_rate=0.01", "--set", "method.r=2"]
    assert trimtab("train", "reviews.csv", "--model", bert, *settings, "--dry-run") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reviews.csv"]
    shown = capsys.readouterr().out
    assert trimtab("train", "reviews.csv", "--model", bert, *settings) == 0
    metrics = json.loads((tmp_path / "runs" / "reviews" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["validation"]["accuracy"] > 0.9
    facts = {line.split("  ")[0]: " ".join(line.split()) for line in shown.splitlines()}
    trained, total = metrics["trainable_parameters"], metrics["total_parameters"]
    assert facts["trained parameters"] == f"trained parameters {trained:,} of {total:,} ({trained / total:.2%})"
    assert facts["steps"] == f"steps {metrics['steps']}"
    assert "learning_rate: 0.01" in shown
    assert "Example 1" in shown


def test_what_is_known_is_not_guessed(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "reviews.csv", [(*review(i), i) for i in range(24)], ("said", "how", "n"))
    known = ["--set", "data.columns={text: said, label: how}", "--set", "method=ia3", "--set", "data.validation=0.25"]
    assert trimtab("init", "reviews.csv", "--model", bert, *known) == 0
    found = recipes.read(tmp_path / "recipe.yaml")
    assert found.data.columns == {"text": "said", "label": "how"}
    assert found.data.validation == 0.25
    assert found.method == {"name": "ia3"}
    assert found.training["learning_rate"] == pytest.approx(2e-3 * METHODS["ia3"].relative_rate)
    assert trimtab("train", "reviews.csv", "--model", bert, *known, "--set", "training.epochs=1") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("reviews.csv",), "reviews.csv needs --model MODEL, or a recipe"),
        (("recipe.yaml", "--model", "x"), "recipe.yaml has its model in it: --set model=MODEL changes it"),
    ],
)
def test_train_takes_a_recipe_or_data_with_a_model(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trimtab("train", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_may_leave_its_task_out(recipe: Path) -> None:
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    del settings["task"]
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    said: list[str] = []
    assert recipes.read(recipe, say=said.append).task == "text-classification"
    assert said == ["Task guessed: text-classification (task: changes this)"]
