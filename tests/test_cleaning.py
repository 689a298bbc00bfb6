"""Rows that are not trained on: which, that it is said, and that what is held out stays as it was given."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import review, write_csv

from trimtab import recipe as recipes
from trimtab.errors import ConfigError, DataError, RecipeError
from trimtab.tasks import TASKS, Data
from trimtab.training import train

ROWS = [
    ("the film was good", "praise"),
    ("the film was bad", "blame"),
    ("the film was good", "praise"),
    ("the meal was fine", "praise"),
    ("the meal was fine", "blame"),
    ("the room is dull", "blame"),
    ("very very very very good", "praise"),
]
HELD = [("the room is dull", "praise"), ("a room", "blame"), ("a room", "blame")]


def prepare(model: Path, task: str = "text-classification", **data: Any) -> tuple[Any, dict[str, Any], list[str]]:
    said: list[str] = []
    found, rows = TASKS[task].from_data(Data(**data), str(model), 0, lambda line: said.append(str(line)))
    return found, rows, said


def kept(model: Path, folder: Path, *drop: str, **data: Any) -> tuple[list[str], list[str]]:
    """The texts that are trained on, and what was said of rows."""
    path, held = write_csv(folder / "a.csv", ROWS), write_csv(folder / "b.csv", HELD)
    task, rows, said = prepare(model, train=path, validation=held, drop=drop, **data)
    assert len(rows["validation"]) == len(HELD)
    texts = [task.reader.decode(row["input_ids"], skip_special_tokens=True) for row in rows["train"]]
    return texts, [line for line in said if "such as" in line]


TEXTS = [text for text, _ in ROWS]
LEAK = "validation: the inputs of 1 of 3 rows are also trained on, such as 'the room is dull / praise'"


@pytest.mark.parametrize(
    ("drop", "without", "said"),
    [
        ([], [], []),
        (["duplicate"], [2], ["train: 1 of 7 rows dropped that are there before, such as "
                              "'the film was good / praise'"]),
        (["conflicting"], [3, 4], ["train: 2 of 7 rows dropped whose inputs are there with another answer, such as "
                                   "'the meal was fine / praise'"]),
        (["leaked"], [5], ["train: 1 of 7 rows dropped whose inputs are also held out, such as "
                           "'the room is dull / blame'"]),
        (["too_long"], [6], ["train: 1 of 7 rows dropped that would be cut, such as "
                             "'very very very very good / praise'"]),
    ],
)  # fmt: skip
def test_each_reason(tmp_path: Path, bert: Path, drop: list[str], without: list[int], said: list[str]) -> None:
    """[CLS] four words [SEP] are 6 tokens."""
    texts, lines = kept(bert, tmp_path, *drop, max_length=6)
    expected = [text for i, text in enumerate(TEXTS) if i not in without]
    assert texts == [" ".join(text.split()[:4]) for text in expected]
    assert sorted(lines) == sorted([LEAK, *said])


def test_all_reasons_together(tmp_path: Path, bert: Path) -> None:
    texts, _ = kept(bert, tmp_path, "too_long", "duplicate", "leaked", "conflicting", max_length=6)
    assert texts == ["the film was good", "the film was bad"]


def test_of_a_file_that_is_split_no_text_is_on_both_sides(tmp_path: Path, bert: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [review(i % 12) for i in range(120)])
    _, _, said = prepare(bert, train=path)
    assert any(line.startswith("validation: the inputs of 12 of 12 rows are also trained on") for line in said)
    _, rows, said = prepare(bert, train=path, drop=["duplicate"])
    assert not any("also trained on" in line for line in said)
    assert len(rows["train"]) + len(rows["validation"]) == len({review(i) for i in range(12)})


def test_nothing_left_is_an_error(tmp_path: Path, bert: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ROWS)
    with pytest.raises(DataError, match=r"data\.drop: leaked leaves no row to train on"):
        prepare(bert, train=path, validation=path, drop=["leaked"])


def test_pairs_conflict_as_pairs(tmp_path: Path, bert: Path) -> None:
    pairs = [("a film", "a meal", "yes"), ("a film", "a room", "no"), ("a room", "a film", "yes")]
    path = write_csv(tmp_path / "a.csv", [*pairs, ("a film", "a room", "yes")], ("premise", "hypothesis", "label"))
    held = write_csv(tmp_path / "b.csv", [("a film", "a film", "yes")], ("premise", "hypothesis", "label"))
    _, rows, _ = prepare(bert, train=path, validation=held, drop=["too_long"], max_length=7)
    assert len(rows["train"]) == 4  # [CLS] a film [SEP] a meal [SEP]
    with pytest.raises(DataError, match="too_long leaves no row"):
        prepare(bert, train=path, validation=held, drop=["too_long"], max_length=6)
    path = write_csv(tmp_path / "a.csv", [*pairs, ("a film", "a room", "yes"), ("a meal", "a", "no")],
                     ("premise", "hypothesis", "label"))  # fmt: skip
    task, rows, _ = prepare(bert, train=path, validation=held, drop=["conflicting"])
    assert [task.show(row)[0][0] for row in rows["train"]] == [
        "[CLS] a film [SEP] a meal [SEP]",
        "[CLS] a room [SEP] a film [SEP]",
        "[CLS] a meal [SEP] a [SEP]",
    ]


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_words_with_tags(tmp_path: Path, bert: Path) -> None:
    rows = [
        {"tokens": ["a", "film"], "tags": ["O", "B"]},
        {"tokens": ["a", "film"], "tags": ["O", "B"]},
        {"tokens": ["the", "room"], "tags": ["O", "B"]},
        {"tokens": ["the", "room"], "tags": ["O", "O"]},
        {"tokens": ["the", "very", "good", "film"], "tags": ["O", "O", "O", "B"]},
        {"tokens": ["bad", "meal"], "tags": ["O", "B"]},
    ]
    path, held = lines(tmp_path / "a.jsonl", rows), lines(tmp_path / "b.jsonl", rows[-1:])
    drop = ["duplicate", "conflicting", "leaked", "too_long"]
    task, found, _ = prepare(bert, "token-classification", train=path, validation=held, drop=drop, max_length=5)
    assert [task.reader.decode(row["input_ids"]) for row in found["train"]] == ["[CLS] a film [SEP]"]


def test_chats_and_plain_texts(tmp_path: Path, llama: Path) -> None:
    rows = [{"prompt": "film ?", "answer": "good"}, {"prompt": "film ?", "answer": "good"},
            {"prompt": "meal ?", "answer": "good " * 20}, {"prompt": "room ?", "answer": "bad"}]  # fmt: skip
    path, held = (
        lines(tmp_path / "a.jsonl", rows),
        lines(tmp_path / "b.jsonl", [{"prompt": "room ?", "answer": "good"}]),
    )
    given = {"train": path, "validation": held, "max_length": 16}
    _, found, said = prepare(llama, "text-generation", drop=["duplicate", "too_long", "leaked"], **given)
    assert len(found["train"]) == 1
    assert "train: 1 of 2 rows dropped that would be cut, such as 'meal ? / good good" in "\n".join(said)
    plain = lines(tmp_path / "c.jsonl", [{"text": "film"}, {"text": "film"}, {"text": "meal"}])
    _, found, _ = prepare(llama, "text-generation", train=plain, validation=plain, drop=["duplicate"])
    assert len(found["train"]) == 2
    with pytest.raises(ConfigError, match="too_long is of no use to plain texts"):
        prepare(llama, "text-generation", train=plain, validation=plain, drop=["too_long"])


def test_what_a_recipe_cannot_drop(recipe: Path) -> None:
    read = [f"data.drop=[duplicate, {reason}]" for reason in ("duplicates", "conflicting", "too_long")]
    with pytest.raises(RecipeError, match=r"data\.drop\.1: Input should be 'duplicate', 'conflicting'"):
        recipes.read(recipe, [read[0]])
    other = ["task=text-generation", "data.columns={}"]
    with pytest.raises(RecipeError, match=r"data\.drop: conflicting is of no use to text-generation"):
        recipes.read(recipe, [*other, read[1]])
    with pytest.raises(RecipeError, match=r"data\.drop: too_long is of no use to question-answering"):
        recipes.read(recipe, ["task=question-answering", read[2]])
    with pytest.raises(RecipeError, match=r"data\.drop is of no use to image-classification"):
        recipes.read(recipe, ["task=image-classification", "data.drop=[duplicate]"])


def test_the_page_of_a_run_has_the_report(recipe: Path) -> None:
    write_csv(recipe.parent / "train.csv", [*(review(i) for i in range(24)), review(0), ("", "praise")])
    result = train(recipes.read(recipe, ["data.drop=[duplicate]", "training.epochs=1"]), lambda _: None)
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "<li>train: 26 rows read, 25 kept, 1 empty dropped</li>" in page
    again = 25 - len({review(i) for i in range(24)})
    assert f"<li>train: {again} of 25 rows dropped that are there before, such as &#x27;the " in page
    assert recipes.read(result.folder / "recipe.yaml").data.drop == ["duplicate"]
