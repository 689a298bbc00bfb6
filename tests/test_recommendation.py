"""Numbers for texts, ratings and next items: what is read, baselines, scores, runs, and one adapter for each user."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_csv
from safetensors.torch import load_file
from transformers import EvalPrediction

from trimtab import LoraConfig, run
from trimtab import recipe as recipes
from trimtab.errors import DataError
from trimtab.tasks import TASKS, Data
from trimtab.tasks.next_item import ranking
from trimtab.training import planned, train

SCORES = {"good": 9.0, "fine": 7.0, "dull": 3.0, "bad": 1.0}
TEXTS = [(f"the {thing} was {word}", score) for word, score in SCORES.items() for thing in ("film", "meal", "room")]
# Even items are better, and users 0 and 1 are content with more.
RATINGS = [(f"u{u}", i, 3 + (1 if u < 2 else -1) + (1 if i % 2 == 0 else -1)) for u in range(4) for i in range(10, 18)]
CYCLE = ["7", "x y", "100", "9"]  # what follows what, round and round


def prepare(task: str, model: Path, seed: int = 0, **data: Any) -> tuple[Any, dict[str, Any], list[str]]:
    said: list[str] = []
    found, rows = TASKS[task].from_data(Data(**data), str(model), seed, lambda line: said.append(str(line)))
    return found, rows, said


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(folder: Path, **settings: Any) -> recipes.Recipe:
    method = {"name": "lora", "r": 4, "target_modules": ["query", "value"]}
    (folder / "recipe.yaml").write_text(json.dumps({"method": method, **settings, "output": "run"}), encoding="utf-8")
    return recipes.read(folder / "recipe.yaml")


# Text regression


def test_numbers_keep_their_digits_and_zero_is_one(tmp_path: Path, bert: Path) -> None:
    values = [0, 1.23456789, -3e5, 7]
    path = write_csv(tmp_path / "a.csv", [*(("a film", value) for value in values), ("a room", "")])
    task, rows, said = prepare("text-regression", bert, train=path, validation=path)
    assert said[1] == "train: 5 rows read, 4 kept, 1 empty dropped"
    assert (task.mean, task.deviation) == pytest.approx((np.mean(values), np.std(values)), rel=1e-12)
    assert rows["train"]["labels"] == pytest.approx((np.array(values) - np.mean(values)) / np.std(values), rel=1e-9)
    assert task.show(rows["train"][1])[1] == ("1.23457", True)
    batch = task.collate([rows["train"][i] for i in range(4)])
    assert batch["labels"].dtype == torch.float32


def test_errors_are_in_the_unit_of_the_labels(tmp_path: Path, bert: Path) -> None:
    path = write_csv(tmp_path / "a.csv", TEXTS)
    task, rows, _ = prepare("text-regression", bert, train=path, validation=path)
    truth, guess = np.array([1.0, 2.0, 9.0]), np.array([[2.0], [2.0], [5.0]])
    found = task.metrics(
        EvalPrediction((guess - task.mean) / task.deviation, (truth - task.mean) / task.deviation), None
    )
    assert found == pytest.approx({"rmse": math.sqrt((1 + 0 + 16) / 3), "mae": 5 / 3})
    scores = np.array([score for _, score in TEXTS])
    assert task.baseline(rows["train"], rows["validation"]) == pytest.approx(
        {"rmse": scores.std(), "mae": np.abs(scores - scores.mean()).mean()}
    )


def test_what_is_no_number(tmp_path: Path, bert: Path) -> None:
    held = write_csv(tmp_path / "b.csv", [("a film", "inf")])
    with pytest.raises(DataError, match="validation: the label 'inf' is no number"):
        prepare("text-regression", bert, train=write_csv(tmp_path / "a.csv", TEXTS), validation=held)
    with pytest.raises(DataError, match="train: the label 'many' is no number"):
        prepare("text-regression", bert, train=write_csv(tmp_path / "a.csv", [("a", "many"), ("film", "3")] * 3))
    with pytest.raises(DataError, match="the label of all rows is 3: there is nothing to learn"):
        prepare("text-regression", bert, train=write_csv(tmp_path / "a.csv", [("a", "3"), ("film", "3")] * 3))


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_run_learns_numbers(tmp_path: Path, model: str, request: pytest.FixtureRequest) -> None:
    write_csv(tmp_path / "a.csv", [(text, 1000 * score) for text, score in TEXTS])
    base = request.getfixturevalue(model)
    method = {"name": "lora", "r": 4, "target_modules": "all-linear"}
    settings = recipe(tmp_path, task="text-regression", model=str(base), data={"train": "a.csv", "validation": "a.csv"},
                      method=method, training={"epochs": 60, "batch_size": 6, "learning_rate": 0.01})  # fmt: skip
    result = train(settings, lambda _: None)
    assert result.metrics["majority"]["validation"]["rmse"] == pytest.approx(1000 * math.sqrt(10))  # of 9, 7, 3 and 1
    assert result.metrics["validation"]["rmse"] < 600
    found = run.load(result.folder)
    good, bad = found.task.predict(found.model, ["the film was good", "the film was bad"])
    assert good["label"] == pytest.approx(9000, abs=1200)
    assert bad["label"] == pytest.approx(1000, abs=1200)
    assert run.merge(result.folder, tmp_path / "merged") < 1e-4


# Ratings


def test_users_and_items_are_tokens_of_their_own(tmp_path: Path, bert: Path) -> None:
    rows = [("ada", "x y", "the film", 4), ("bob", "7", "a room", 2), ("ada", "7", "", 5)]
    path = write_csv(tmp_path / "a.csv", rows, ("user_id", "item_id", "title", "rating"))
    held = write_csv(tmp_path / "b.csv", [("film", "7", "a room", 5)], ("user_id", "item_id", "title", "rating"))
    task, found, said = prepare("rating-prediction", bert, train=path, validation=held)
    assert [task.show(row)[0][0] for row in found["train"]] == [
        "[CLS] <user:ada> <item:x y> the film [SEP]",
        "[CLS] <user:bob> <item:7> a room [SEP]",
        "[CLS] <user:ada> <item:7> [SEP]",
    ]
    assert "validation: 1 of 1 rows are of a new user, which no training row has" in said
    assert task.show(found["validation"][0])[0][0] == "[CLS] film <item:7> a room [SEP]"
    words = len(task.reader) - 4
    assert task.tokens() == list(range(words, words + 4))
    model, fresh = task.load_model(str(bert), "none")
    assert model.get_input_embeddings().num_embeddings == words + 4
    assert fresh == ["classifier"]
    # The means of 7 and of x y: (2 + 5) / 2 and 4. A new item would get the mean of all.
    assert task.baseline(found["train"], found["validation"]) == pytest.approx({"rmse": 1.5, "mae": 1.5})
    strange = found["validation"].remove_columns("item").add_column("item", ["new"])
    assert task.baseline(found["train"], strange) == pytest.approx({"rmse": 5 - 11 / 3, "mae": 5 - 11 / 3})


def test_columns_may_say_their_types(tmp_path: Path, bert: Path) -> None:
    """As in the tables of ratings that RecBole reads."""
    named = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
    path = write_csv(tmp_path / "a.csv", [("1", "7", 4, 881250949), ("2", "9", 2, 881250950)], named)
    task, _, _ = prepare("rating-prediction", bert, train=path, validation=path)
    assert task.names == {"user": named[0], "item": named[1], "rating": named[2]}


def test_a_plain_name_goes_before_one_with_a_type(tmp_path: Path, bert: Path) -> None:
    named = ("user", "item", "rating", "rating:float", "user:other")
    path = write_csv(tmp_path / "a.csv", [("1", "7", 4, 5, "x"), ("2", "9", 2, 1, "y")], named)
    task, _, _ = prepare("rating-prediction", bert, train=path, validation=path)
    assert task.names == {"user": "user", "item": "item", "rating": "rating"}


def test_a_plan_counts_users_and_items(tmp_path: Path, bert: Path) -> None:
    write_csv(tmp_path / "a.csv", RATINGS, ("user", "item", "rating"))
    settings = recipe(tmp_path, task="rating-prediction", model=str(bert),
                      data={"train": "a.csv", "validation": "a.csv"}, training={"epochs": 1})  # fmt: skip
    # 12 rows of 64 numbers; query and value of 2 layers, each A (4, 64) and B (64, 4); the head, (1, 64) and (1,)
    assert planned(settings, lambda _: None).trainable_parameters == 12 * 64 + 2 * 2 * 2 * 4 * 64 + 64 + 1


METHODS: list[Any] = [
    {"name": "lora", "r": 4, "target_modules": ["query", "value"]},
    {"name": "prompt_tuning", "num_virtual_tokens": 4},
    [{"name": "lora", "r": 4, "target_modules": ["query"]}, {"name": "prefix_tuning", "num_virtual_tokens": 3}],
]


@pytest.mark.parametrize("method", METHODS, ids=["lora", "prompt", "union"])
def test_a_run_learns_what_users_like(tmp_path: Path, bert: Path, method: Any) -> None:
    held = RATINGS[::5]
    write_csv(tmp_path / "a.csv", [row for row in RATINGS if row not in held], ("user", "item", "rating"))
    write_csv(tmp_path / "b.csv", held, ("user", "item", "rating"))
    settings = recipe(tmp_path, task="rating-prediction", model=str(bert),
                      data={"train": "a.csv", "validation": "b.csv"},
                      method=method, training={"epochs": 60, "batch_size": 4, "learning_rate": 0.01})  # fmt: skip
    result = train(settings, lambda _: None)
    guess, tuned = result.metrics["majority"]["validation"]["rmse"], result.metrics["validation"]["rmse"]
    assert tuned < guess / 2
    saved = load_file(result.folder / "adapter_model.safetensors")
    assert sum(value.shape == (12, 64) for value in saved.values()) == 1  # 4 users and 8 items, and no other row
    found = run.load(result.folder)
    like, dislike = found.task.predict(found.model, found.task.asked(["u0", "12", "u3", "13"]))
    assert like["rating"] > 4 > 2 > dislike["rating"]
    assert found.task.inputs(tmp_path / "b.csv")[0] == ("u0", "10")
    if isinstance(method, dict) and method["name"] == "lora":
        assert run.merge(result.folder, tmp_path / "merged") < 1e-4
        merged, _ = found.task.load_model(str(tmp_path / "merged"), "none")
        assert found.task.predict(merged, [("u0", "12")])[0]["rating"] == pytest.approx(like["rating"], abs=1e-4)


def test_an_adapter_for_each_user_on_one_trunk(tmp_path: Path, bert: Path) -> None:
    """What all users have in common is trained first; then each gets a small adapter of its own on top of it."""
    write_csv(tmp_path / "a.csv", RATINGS, ("user", "item", "rating"))
    settings = recipe(tmp_path, task="rating-prediction", model=str(bert),
                      data={"train": "a.csv", "validation": "a.csv"},
                      training={"epochs": 10, "batch_size": 8, "learning_rate": 0.01})  # fmt: skip
    found = run.load(train(settings, lambda _: None).folder)
    task, model = found.task, found.model
    common = {name: value.clone() for name, value in model.state_dict().items()}
    rows = task.encode({"user": [u for u, _, _ in RATINGS], "item": [str(i) for _, i, _ in RATINGS],
                        "rating": [str(r) for *_, r in RATINGS]}, "train", print)  # fmt: skip
    users = ("u0", "u3")
    batches = {user: task.collate([rows[i] for i, (who, *_) in enumerate(RATINGS) if who == user]) for user in users}
    for user, batch in batches.items():
        batch["labels"] = -batch["labels"]  # of late they like what they did not
        model.add_adapter(user, LoraConfig(r=2, target_modules=["key", "dense"]))
        model.set_adapter(["default", user])
        own = [value for name, value in model.named_parameters() if f".adapters.{user}." in name]
        optimizer = torch.optim.Adam(own, 0.005)
        for _ in range(60):
            optimizer.zero_grad()
            model.train()(**batch).loss.backward()
            optimizer.step()
    losses = {}
    for who in users:
        model.set_adapter(["default", who])
        losses |= {(who, user): model.eval()(**batch).loss.item() for user, batch in batches.items()}
    model.set_adapter("default")
    for user, batch in batches.items():
        assert losses[user, user] < model.eval()(**batch).loss.item() / 2
        assert all(losses[user, user] < losses[other, user] for other in users if other != user)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in common.items())


# Next items


def sequences(count: int, length: int) -> list[dict[str, Any]]:
    return [{"items": [CYCLE[(start + i) % 4] for i in range(length)]} for start in range(count)]


def test_each_item_is_learned_from_those_before_it(tmp_path: Path, bert: Path) -> None:
    rows = [{"items": ["7", "x y", "100"], "titles": ["a film", "a room", ""]}, {"items": [7], "titles": ["a film"]}]
    held = [{"items": ["100", "7"], "titles": ["", "a film"]}, {"items": ["7", "new"], "titles": ["a film", "bad"]}]
    paths = {"train": lines(tmp_path / "a.jsonl", rows), "validation": lines(tmp_path / "b.jsonl", held)}
    task, found, said = prepare("next-item", bert, **paths)
    assert [[text for text, _ in task.show(row)] for row in found["train"]] == [
        ["[CLS] <item:7> a film [SEP]", "x y a room"],
        ["[CLS] <item:7> a film <item:x y> a room [SEP]", "100"],
    ]
    assert [[text for text, _ in task.show(row)] for row in found["validation"]] == [
        ["[CLS] <item:100> [SEP]", "7 a film"],
        ["[CLS] <item:7> a film [SEP]", "new bad"],
    ]
    assert task.items == ["100", "7", "new", "x y"]
    assert "train: 1 sequences of one item dropped, after which nothing follows" in said
    assert "validation: 1 of 2 items to be found are in no training row" in said
    assert (task.count(found["train"]), task.count(found["validation"])) == (1, 2)
    assert len(task.tokens()) == 3


def test_of_long_sequences_the_end_is_read(tmp_path: Path, bert: Path) -> None:
    path = lines(tmp_path / "a.jsonl", sequences(1, 9))
    task, found, said = prepare("next-item", bert, train=path, validation=path, max_length=5)
    assert task.show(found["validation"][0])[0][0] == "[CLS] <item:x y> <item:100> <item:9> [SEP]"
    assert "train: 5 of 8 sequences cut to 5 tokens" in said  # of those with 1 to 8 items, which leave 3


def test_the_last_items_are_set_aside(tmp_path: Path, bert: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [*sequences(8, 5), {"items": ["7", "9"]}])
    task, found, _ = prepare("next-item", bert, train=path, validation=0.5)
    assert (len(found["validation"]), task.count(found["train"])) == (4, 9)
    assert len(found["train"]) == 4 * 3 + 4 * 4 + 1
    _, found, _ = prepare("next-item", bert, train=path, validation=1.0)
    assert (len(found["validation"]), len(found["train"])) == (8, 8 * 3 + 1)
    with pytest.raises(DataError, match="0 sequences of three items and more are too few"):
        prepare("next-item", bert, train=lines(tmp_path / "b.jsonl", [{"items": "7 9"}] * 20))
    uneven = lines(tmp_path / "c.jsonl", [{"items": ["7", "9", "7"], "titles": ["a film"]}] * 3)
    with pytest.raises(DataError, match="items have 1 titles in the row"):
        prepare("next-item", bert, train=uneven, validation=1.0)
    text = lines(tmp_path / "d.jsonl", [{"items": "7 9 7", "titles": "a film"}])
    with pytest.raises(DataError, match="Titles are a list as long as that of their items, not 'a film'"):
        prepare("next-item", bert, train=text)


def test_ranks_and_scores_are_those_of_the_definition(tmp_path: Path, bert: Path) -> None:
    path = lines(tmp_path / "a.jsonl", sequences(4, 6))
    task, found, _ = prepare("next-item", bert, train=path, validation=path)
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    ranks = task.reduced(logits, torch.tensor([0, 2, 1]))
    assert ranks.tolist() == [1, 3, 4]
    assert task.metrics(EvalPrediction(ranks.numpy(), None), None) == pytest.approx(
        {"hr@10": 1.0, "ndcg@10": (1 + 1 / math.log2(4) + 1 / math.log2(5)) / 3}
    )
    assert ranking([10, 11]) == pytest.approx({"hr@10": 0.5, "ndcg@10": 1 / math.log2(11) / 2})
    # Each of the four items is learned five times, so all are equal, and among equals the right one comes last.
    assert task.baseline(found["train"], found["validation"]) == pytest.approx(
        {"hr@10": 1.0, "ndcg@10": 1 / math.log2(5)}
    )


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_run_learns_what_follows(tmp_path: Path, model: str, request: pytest.FixtureRequest) -> None:
    lines(tmp_path / "a.jsonl", sequences(4, 7))
    lines(tmp_path / "b.jsonl", sequences(4, 6))
    base = request.getfixturevalue(model)
    method = {"name": "lora", "r": 16, "target_modules": "all-linear"}
    settings = recipe(tmp_path, task="next-item", model=str(base), data={"train": "a.jsonl", "validation": "b.jsonl"},
                      method=method, training={"epochs": 60, "batch_size": 8, "learning_rate": 0.01})  # fmt: skip
    result = train(settings, lambda _: None)
    assert result.metrics["validation"]["ndcg@10"] > 0.99 > result.metrics["majority"]["validation"]["ndcg@10"]
    found = run.load(result.folder)
    first, second = found.task.predict(found.model, [["7", "x y", "100", "9", "7"], "100 9 7"])
    assert (first["item"], second["item"]) == ("x y", "x y")
    assert first["top"][0]["item"] == "x y"
    assert sum(best["probability"] for best in first["top"]) == pytest.approx(1)
    assert found.task.inputs(tmp_path / "b.jsonl")[0] == ["7", "x y", "100", "9", "7", "x y"]
    assert run.merge(result.folder, tmp_path / "merged") < 1e-4
