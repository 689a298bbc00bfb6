"""Copies of training rows with other words: each operation by its definition, and runs that are the same each time."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import review, write_csv
from safetensors.torch import load_file

from trimtab import recipe as recipes
from trimtab.errors import ConfigError, DataError, RecipeError
from trimtab.tasks import TASKS, Data
from trimtab.tasks.augmentation import Augment, augmenters, deleted, replaced, swapped
from trimtab.training import train

WORDS = [str(i) for i in range(20)]


def prepare(model: Path, augment: dict[str, Any] | None, *more: Any, **data: Any) -> tuple[Any, list[str], list[str]]:
    """The task, the texts that are trained on, and what was said."""
    said: list[str] = []
    made = Data(augment=augment and Augment(**augment), **data)
    task, rows = TASKS["text-classification"].from_data(made, str(model), 0, lambda line: said.append(str(line)), more)
    return task, [task.show(row)[0][0] + " " + task.show(row)[1][0] for row in rows["train"]], said


def test_words_are_left_out_with_their_probability() -> None:
    drawn = random.Random(0)
    copies = [deleted(0.25, WORDS, drawn) for _ in range(400)]
    for copy in copies:
        assert [word for word in WORDS if word in copy] == copy  # in their order
    left_out = 1 - sum(map(len, copies)) / 8000
    assert left_out == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 8000) ** 0.5)  # four standard errors
    assert {len(deleted(0.99, WORDS[:2], drawn)) for _ in range(50)} == {1}
    assert deleted(0.5, [], drawn) == []


@pytest.mark.parametrize(("share", "swaps"), [(0.01, 1), (0.1, 2), (0.3, 6)])
def test_so_many_pairs_change_places(share: float, swaps: int) -> None:
    drawn = random.Random(0)
    for _ in range(20):
        copy = swapped(share, WORDS, drawn)
        assert Counter(copy) == Counter(WORDS)
        moved = sum(word != other for word, other in zip(copy, WORDS, strict=True))
        assert moved <= 2 * swaps
        assert swaps > 1 or moved == 2
    assert swapped(share, ["one"], drawn) == ["one"]


@pytest.mark.parametrize(("share", "expected"), [(0.01, 1), (0.1, 2), (0.9, 5)])
def test_so_many_words_become_synonyms(share: float, expected: int) -> None:
    synonyms = {word: [f"{word}a", f"{word}b"] for word in WORDS[:5]}
    drawn = random.Random(0)
    seen = set()
    for _ in range(50):
        pairs = zip(WORDS, replaced(share, synonyms, WORDS, drawn), strict=True)
        changed = [(word, other) for word, other in pairs if word != other]
        assert len(changed) == expected
        assert all(other in synonyms[word] for word, other in changed)
        seen |= {other for _, other in changed}
    assert seen == {other for others in synonyms.values() for other in others}
    assert replaced(0.5, {"film": ["movie"]}, ["Film", "room"], drawn) == ["movie", "room"]


def test_each_copy_is_drawn_anew_by_the_seed() -> None:
    def copies(seed: int) -> list[Any]:
        return [make([" ".join(WORDS)]) for make in augmenters(Augment(copies=3, random_swap=0.1), seed)]

    assert copies(0) == copies(0)
    assert copies(0) != copies(1)
    assert len({copy for [copy] in copies(0)}) == 3


def test_copies_come_behind_the_training_rows_only(tmp_path: Path, bert: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("the film was good", "praise"), ("bad", "blame")])
    held = write_csv(tmp_path / "b.csv", [("a very fine meal", "praise")])
    (tmp_path / "s.json").write_text(json.dumps({"film": ["meal"]}), encoding="utf-8")
    augment = {"copies": 2, "synonym_replacement": 0.1, "synonyms": tmp_path / "s.json"}
    _, texts, said = prepare(bert, augment, train=path, validation=held)
    rows = ["the film was good [SEP] praise", "bad [SEP] blame", *["the meal was good [SEP] praise"] * 2]
    assert texts == [f"[CLS] {row}" for row in rows]
    assert said[-1] == (
        "train: 2 changed copies added to 2 rows, such as 'the meal was good / praise'; 2 without a change left out"
    )


def test_a_pair_is_one_row(tmp_path: Path, bert: Path) -> None:
    header = ("premise", "hypothesis", "label")
    path = write_csv(tmp_path / "a.csv", [("the film", "a meal", "yes"), ("bad", "a room", "no")], header)

    def first(texts: list[str]) -> list[str]:
        return [text.replace("the", "very") for text in texts]

    _, texts, _ = prepare(bert, None, first, train=path, validation=path)
    assert texts[2:] == ["[CLS] very film [SEP] a meal [SEP] yes"]
    _, texts, said = prepare(bert, None, first, lambda texts: ["" for _ in texts], train=path, validation=path)
    assert len(texts) == 3  # nothing is no text
    assert said[-1].endswith("; 3 without a change left out")


def test_what_cannot_be(tmp_path: Path, bert: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("film", "praise"), ("bad", "blame")])
    given = {"train": path, "validation": path}
    with pytest.raises(DataError, match="no copy of a training row is changed"):
        prepare(bert, {"random_swap": 0.5}, **given)
    with pytest.raises(ConfigError, match="gives a text for each; of 2 this one gave 1"):
        prepare(bert, None, lambda texts: texts[:1], **given)
    for content in ("[]", "{}", '{"film": []}', '{"film": "movie"}', '{"film": 3}', "no json"):
        (tmp_path / "s.json").write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=r"s\.json holds no synonyms"):
            prepare(bert, {"synonym_replacement": 0.1, "synonyms": tmp_path / "s.json"}, **given)
    with pytest.raises(DataError, match=r"none\.json cannot be read: No such file"):
        prepare(bert, {"synonym_replacement": 0.1, "synonyms": tmp_path / "none.json"}, **given)
    with pytest.raises(ConfigError, match="TextGeneration has no texts whose words may change"):
        TASKS["text-generation"].from_data(Data(train=path), str(bert), 0, print, [lambda texts: texts])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("augment={}", "data.augment: name an operation: random_deletion, random_swap, synonym_replacement."),
        ("augment.random_swp=0.1", "data.augment has no key 'random_swp'. Did you mean 'random_swap'?"),
        ("augment={random_swap: 2}", "data.augment.random_swap: Input should be "),
        ("augment={synonym_replacement: 0.1}", "synonym_replacement and synonyms, a file of them, need each other."),
        ("augment={random_swap: 0.1, synonyms: s.json}", "and synonyms, a file of them, need each other."),
        ("augment={copies: 0, random_swap: 0.1}", "data.augment.copies: Input should be greater than or equal to 1"),
    ],
)
def test_what_a_recipe_cannot_say(recipe: Path, settings: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.read(recipe, [f"data.{settings}"])
    assert message in str(caught.value)


def test_tasks_without_such_texts_refuse_it(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.augment is of no use to question-answering"):
        recipes.read(recipe, ["task=question-answering", "data.augment={random_swap: 0.1}"])


def test_a_run_with_copies_is_the_same_each_time(recipe: Path) -> None:
    (recipe.parent / "s.json").write_text(json.dumps({"film": ["meal"]}), encoding="utf-8")
    settings = ["data.augment={copies: 2, random_swap: 0.1, synonym_replacement: 0.1, synonyms: s.json}",
                "training.epochs=1"]  # fmt: skip
    first = train(recipes.read(recipe, settings), lambda _: None)
    assert 18 < first.metrics["rows"]["train"] <= 3 * 18
    assert first.metrics["rows"]["validation"] == 6
    again = train(recipes.read(first.folder / "recipe.yaml", [f"output={recipe.parent / 'again'}"]), lambda _: None)
    one, other = (load_file(found.folder / "adapter_model.safetensors") for found in (first, again))
    assert all((one[name] == other[name]).all() for name in one)
    page = (first.folder / "report.html").read_text(encoding="utf-8")
    assert "changed copies added to 18 rows" in page
    assert set(recipes.read(first.folder / "recipe.yaml").made_with) > {"synonyms", "train"}


def test_a_run_takes_an_augmenter(recipe: Path) -> None:
    def there_and_back(texts: list[str]) -> list[str]:
        return [text.replace("the", "a") for text in texts]

    write_csv(recipe.parent / "dev.csv", [review(i) for i in range(40, 46)])
    settings = recipes.read(recipe, ["training.epochs=1", "data.validation=dev.csv"])
    result = train(settings, lambda _: None, augmenters=[there_and_back])
    assert result.metrics["rows"]["train"] == 2 * 24
    assert recipes.read(result.folder / "recipe.yaml").made_with["augmenters"] == "there_and_back"
