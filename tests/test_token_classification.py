"""Token classification: words and tags, which tokens are learned, entity scores, and a run that learns to tag."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trimtab import recipe as recipes
from trimtab import run
from trimtab.errors import DataError
from trimtab.tasks import Data
from trimtab.tasks.token_classification import TokenClassification
from trimtab.training import train

TAGS = {"film": "B-thing", "meal": "B-thing", "good": "I-praise", "fine": "B-praise"}
ROWS = [
    {"tokens": words.split(), "tags": [TAGS.get(word, "O") for word in words.split()]}
    for words in ("the film was fine", "a meal is bad", "the room was good", "a film is dull") * 6
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(bert: Path, **data: Any) -> tuple[TokenClassification, dict[str, Any]]:
    return TokenClassification.from_data(Data(**data), str(bert), 0, lambda _: None)


def refusal(bert: Path, rows: list[dict[str, Any]], folder: Path) -> str:
    path = write(folder / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        prepare(bert, train=path, validation=path)
    return str(caught.value)


def test_the_first_token_of_a_word_has_its_tag(tmp_path: Path, bert: Path) -> None:
    from transformers import BertTokenizerFast

    words = [*"[PAD] [UNK] [CLS] [SEP] [MASK] the fi ##lm was".split()]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, model_max_length=32).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    path = write(tmp_path / "a.jsonl", [{"tokens": ["the", "film", "was"], "tags": ["O", "B-thing", "O"]}] * 4)
    task, rows = prepare(tmp_path, train=path, validation=path)
    assert task.labels == ["B-thing", "O"]
    assert task.reader.convert_ids_to_tokens(rows["train"][0]["input_ids"])[2:4] == ["fi", "##lm"]
    assert rows["train"][0]["labels"] == [-100, 1, 0, -100, 1, -100]
    shown = [text for text, learned in task.show(rows["train"][0]) if learned]
    assert shown == ["O", "B-thing", "O"]


def test_labels_are_padded_as_the_tokens_are(tmp_path: Path, bert: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    task, rows = prepare(bert, train=path, validation=path)
    two = [dict(rows["train"][0]), dict(rows["train"][1])]
    two[1] = {name: values[:3] for name, values in two[1].items()}
    for side, gap in (("right", [-100] * 3), ("left", [])):
        task.reader.padding_side = side
        batch = task.collate(two)
        assert batch["labels"].shape == batch["input_ids"].shape
        expected = two[1]["labels"] + gap if side == "right" else [-100] * 3 + two[1]["labels"]
        assert batch["labels"][1].tolist() == expected


def test_texts_with_spaces_are_words(tmp_path: Path, bert: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "the film was", "labels": "O B-thing O"}] * 4)
    _, rows = prepare(bert, train=path, validation=path)
    assert rows["train"][0]["labels"] == [-100, 1, 0, 1, -100]


def test_entities_are_scored_whole(tmp_path: Path, bert: Path) -> None:
    from transformers import EvalPrediction

    path = write(tmp_path / "a.jsonl", [{"tokens": list("abcde"), "tags": ["B-x", "I-x", "O", "B-y", "O"]}] * 4)
    task, _ = prepare(bert, train=path, validation=path)
    number = {label: i for i, label in enumerate(task.labels)}
    truth = [-100, *(number[tag] for tag in ("B-x", "I-x", "O", "B-y", "O")), -100]
    guess = [0, *(number[tag] for tag in ("B-x", "O", "O", "B-y", "O")), 0]
    found = task.metrics(EvalPrediction(np.array([guess]), np.array([truth])), None)
    # Of the entities x (words 1 and 2) and y the second is found; the first is guessed too short.
    assert found == pytest.approx({"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "accuracy": 4 / 5})


def test_rows_that_do_not_fit(tmp_path: Path, bert: Path) -> None:
    short = [{"tokens": list("abc"), "tags": ["O", "O"]}]
    assert "3 words have 2 tags in the row that starts 'a b c'" in refusal(bert, short, tmp_path)
    assert "has one tag only, 'O'" in refusal(bert, [{"tokens": ["a"], "tags": ["O"]}], tmp_path)
    path, other = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", [{"tokens": ["a"], "tags": ["B-new"]}])
    with pytest.raises(DataError, match="test: the label 'B-new' is none that was trained on: "):
        prepare(bert, train=path, test=other)


def test_a_run_learns_to_tag(tmp_path: Path, bert: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "recipe.yaml").write_text(
        f"""
task: token-classification
model: {bert}
data: {{train: a.jsonl, validation: 0.25}}
method: {{name: lora, r: 4, target_modules: all-linear}}
training: {{epochs: 20, batch_size: 6, learning_rate: 0.01}}
output: run
""",
        encoding="utf-8",
    )
    result = train(recipes.read(tmp_path / "recipe.yaml"), lambda _: None)
    assert result.metrics["validation"]["f1"] == 1
    found = run.load(result.folder)
    answers = found.task.predict(found.model, ["a meal is dull", ["the", "room", "was", "good"]])
    assert answers[0] == {"entities": [{"type": "thing", "text": "meal"}], "tags": ["O", "B-thing", "O", "O"]}
    assert answers[1]["entities"] == [{"type": "praise", "text": "good"}]
    assert found.task.inputs(tmp_path / "a.jsonl")[0] == "the film was fine".split()


def test_accumulated_batches_learn_what_one_would(tmp_path: Path, bert: Path) -> None:
    """Each label counts alike, also where rows have different numbers of them: 4 batches of 4, or one of 16."""
    still = tmp_path / "still"
    shutil.copytree(bert, still)
    config = json.loads((bert / "config.json").read_text()) | dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0
    )
    (still / "config.json").write_text(json.dumps(config))
    rows = [{name: values * (1 + i % 3) for name, values in row.items()} for i, row in enumerate(ROWS[:16])]
    path = write(tmp_path / "a.jsonl", rows)
    found = []
    for size, batches in ((16, 1), (4, 4)):
        training = {"epochs": 2, "batch_size": size, "gradient_accumulation_steps": batches, "optim": "sgd",
                    "learning_rate": 0.1, "max_grad_norm": 1e9, "lr_scheduler_type": "constant"}  # fmt: skip
        data = {"train": str(path), "validation": str(path)}
        settings = {"task": "token-classification", "model": str(still), "data": data, "training": training}
        (tmp_path / "recipe.yaml").write_text(json.dumps({**settings, "output": f"run{size}"}))
        result = train(recipes.read(tmp_path / "recipe.yaml"), lambda _: None)
        found.append(load_file(result.folder / "adapter_model.safetensors"))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6, msg=name)
