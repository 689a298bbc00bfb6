"""Question answering: windows, which tokens are learned, SQuAD's scores, and a run that learns to answer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import EvalPrediction

from trimtab import recipe as recipes
from trimtab import run
from trimtab.errors import ConfigError, DataError
from trimtab.tasks import Data
from trimtab.tasks.question_answering import QuestionAnswering, exact, f1, normalised
from trimtab.training import train

FILLER = "the room is not very fine"


def row(question: str, context: str, *answers: str) -> dict[str, Any]:
    found = {"text": list(answers), "answer_start": [context.index(answer) for answer in answers]}
    return {"question": question, "context": context, "answers": found}


ROWS = [
    row(("was it good", "is it")[len(start) % 2], f"{start} {thing} was {word} {end}".strip(), word)
    for start in ("the", "a")
    for thing in ("film", "meal", "room")
    for word in ("good", "very bad", "dull", "very fine")
    for end in ("", "the room is not")
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(bert: Path, **data: Any) -> tuple[QuestionAnswering, dict[str, Any], list[str]]:
    said: list[Any] = []
    task, rows = QuestionAnswering.from_data(Data(**data), str(bert), 0, said.append)
    return task, rows, list(map(str, said))


def prepared(bert: Path, folder: Path, rows: list[dict[str, Any]], **data: Any) -> tuple[QuestionAnswering, Any]:
    path = write(folder / "a.jsonl", rows)
    task, found, _ = prepare(bert, train=path, validation=path, **data)
    return task, found["train"]


def refusal(bert: Path, folder: Path, *rows: dict[str, Any], **data: Any) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        prepared(bert, folder, list(rows), **data)
    return str(caught.value)


def learned(task: QuestionAnswering, row: dict[str, Any]) -> str:
    return " ".join(f"<{text}>" if is_learned else text for text, is_learned in task.show(row))


def test_the_span_of_the_answer_is_learned(tmp_path: Path, bert: Path) -> None:
    context = "  the film was not very good"  # blanks count
    task, [found] = prepared(bert, tmp_path, [row("film was", context, "not very", "very good")])
    assert learned(task, found) == "[CLS] film was [SEP] the film was <not very> good [SEP]"
    assert (found["start_positions"], found["end_positions"]) == (7, 8)
    assert [context[start:end] for start, end in found["spans"][4:10]] == context.split()
    assert found["answers"] == ["not very", "very good"]


def test_a_long_context_is_read_in_windows_that_overlap(tmp_path: Path, bert: Path) -> None:
    """Of 12 tokens 3 are special and 2 the question; 7 words of context fit, of which the next window repeats 4."""
    words = "the film was good the meal was bad the room was dull".split()
    path = write(tmp_path / "a.jsonl", [row("is room", " ".join(words), "dull"), row("is film", "film was", "was")])
    task, rows, said = prepare(bert, train=path, validation=path, max_length=12)
    read = [task.reader.decode(ids).split()[4:-1] for ids in rows["train"]["input_ids"]]
    assert read == [words[:7], words[3:10], words[6:], ["film", "was"]]
    assert rows["train"]["row"] == [0, 0, 0, 1]
    assert task.count(rows["train"]) == 2
    assert rows["train"]["start_positions"] == [0, 0, 9, 5]  # 0 is [CLS]: no answer here
    assert "train: 2 rows in 4 windows of up to 12 tokens" in said


def test_answers_that_no_window_holds_are_told(tmp_path: Path, bert: Path) -> None:
    long = " ".join([FILLER] * 4)
    rows = [row("film", long, long), row("film", "a film", "film")]
    path = write(tmp_path / "a.jsonl", rows)
    _, _, said = prepare(bert, train=path, validation=path, max_length=16)
    assert "train: 1 answers are in no window as a whole; there the model learns to find none" in said
    assert "train: no window of 16 tokens holds an answer" in refusal(bert, tmp_path, rows[0], max_length=16)


def test_long_questions_are_cut(tmp_path: Path, bert: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row("is the film good or is the film bad", "a good film", "good")])
    task, rows, said = prepare(bert, train=path, validation=path, max_length=12)
    assert task.reader.decode(rows["train"][0]["input_ids"]) == "[CLS] is the film good [SEP] a good film [SEP]"
    assert "train: 1 questions cut to 4 tokens" in said


def test_rows_that_cannot_be_right(tmp_path: Path, bert: Path) -> None:
    wrong = row("film", "a good film", "good") | {"answers": {"text": ["good"], "answer_start": [3]}}
    message = "the answer 'good' should start at character 3 of the context that starts 'a good film'; there is 'ood '"
    assert message in refusal(bert, tmp_path, wrong)
    assert "Answers are {text: [...], answer_start: [...]}" in refusal(bert, tmp_path, wrong | {"answers": "good"})
    right = row("film", "a good film", "good")
    assert "data.max_length=7 leaves a context no room" in refusal(bert, tmp_path, right, max_length=7)
    assert "no row has question and context and answers" in refusal(bert, tmp_path, right | {"context": " "})


def test_padding_on_the_right_keeps_positions(tmp_path: Path, bert: Path) -> None:
    task, rows = prepared(bert, tmp_path, [row("film", FILLER, "fine"), ROWS[0]])
    task.reader.padding_side = "left"
    batch = task.collate([rows[0], rows[1]])
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions"}
    assert batch["input_ids"][1, 0] == task.reader.cls_token_id


@pytest.mark.parametrize(
    ("guess", "answer", "match", "overlap"),
    [
        ("The Film!", "film", 1, 1),
        ("a good film", "the very good film", 0, 2 * 1 * (2 / 3) / (1 + 2 / 3)),  # precision 2/2, recall 2/3
        ("very very good", "very good", 0, 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("bad", "good", 0, 0),
        ("", "", 1, 1),
        ("", "good", 0, 0),
        ("the", "a", 1, 1),  # of both nothing is left
    ],
)
def test_scores_are_those_of_squad(guess: str, answer: str, match: float, overlap: float) -> None:
    assert exact(guess, answer) == match
    assert f1(guess, answer) == pytest.approx(overlap)


def test_normalising_is_that_of_squad() -> None:
    assert normalised("  The  U.S.  and an\tAnthem-like  a-b") == "us and anthemlike ab"


def logits(rows: Any, *spans: tuple[int, int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Of each window zeros, with half a score at the first and half at the last token of a span; padded with -100."""
    width = max(map(len, rows["input_ids"])) + 2
    starts, ends = np.full((2, len(rows), width), -100.0)
    for i, (start, end, score) in enumerate(spans):
        size = len(rows["input_ids"][i])
        starts[i, :size] = ends[i, :size] = 0
        starts[i, start] = ends[i, end] = score / 2
    return starts, ends


def test_the_best_span_of_all_windows_answers(tmp_path: Path, bert: Path) -> None:
    context = "the film was good the meal was bad the room was dull"
    task, rows = prepared(bert, tmp_path, [row("is room", context, "bad the room")], max_length=12)
    # Windows of words 0-6, 3-9 and 6-11, each from token 4 on. The best is words 7 to 9 in the second, 8 to 10.
    starts, ends = logits(rows, (4, 4, 5.0), (8, 10, 6.0), (6, 6, 4.0))
    assert task.metrics(EvalPrediction((starts, ends), None), rows) == {"exact_match": 1, "f1": 1}
    [((start, end), likely)] = task._found(starts, ends, rows["row"], rows["spans"], [0, 0, 0]).values()
    assert context[start:end] == "bad the room"
    total = 0.0  # by hand: every span of every window
    for window, begin, finish in zip(rows["spans"], starts, ends, strict=True):
        inside = [i for i, span in enumerate(window) if span[0] >= 0]
        total += sum(np.exp(begin[i] + finish[j]) for i in inside for j in inside if i <= j)
    assert likely == pytest.approx(np.exp(6.0) / total)
    # An end before its start is no span: the question and the first window's 5 for one word are left.
    assert task.metrics(EvalPrediction(logits(rows, (9, 5, 8.0), (1, 1, 9.0), (10, 10, 1.5)), None), rows)["f1"] == 0


def test_no_answer_is_an_answer_where_rows_have_none(tmp_path: Path, bert: Path) -> None:
    nothing = row("is meal", "film was good") | {"answers": {"text": [], "answer_start": []}}
    task, rows = prepared(bert, tmp_path, [row("is film", "the film was good", "good"), nothing])
    assert task.unanswerable
    assert learned(task, rows[1]) == "<[CLS]> is meal [SEP] film was good [SEP]"
    sure = (7, 7, 3.0)
    assert task.metrics(EvalPrediction(logits(rows, sure, (0, 0, 3.0)), None), rows) == {"exact_match": 1, "f1": 1}
    assert task.metrics(EvalPrediction(logits(rows, sure, sure), None), rows) == {"exact_match": 0.5, "f1": 0.5}
    never, _ = prepared(bert, tmp_path, [row("is film", "the film was good", "good")])
    assert not never.unanswerable
    assert never.metrics(EvalPrediction(logits(rows, sure, (0, 0, 3.0)), None), rows)["exact_match"] == 0.5


@pytest.mark.parametrize("grouped", ["random", "group_by_length"])
def test_a_run_learns_to_answer(tmp_path: Path, bert: Path, grouped: str) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "recipe.yaml").write_text(
        f"""
task: question-answering
model: {bert}
data: {{train: a.jsonl, validation: 0.25}}
method: {{name: lora, r: 8, target_modules: all-linear}}
training: {{epochs: 20, batch_size: 8, learning_rate: 0.01, train_sampling_strategy: {grouped}}}
output: run
""",
        encoding="utf-8",
    )
    result = train(recipes.read(tmp_path / "recipe.yaml"), lambda _: None)
    assert result.metrics["validation"]["exact_match"] == 1
    found = run.load(result.folder)
    inputs = found.task.asked(["is it", "a film was dull the room is not"])
    [answer] = found.task.predict(found.model, inputs)
    assert (answer["answer"], answer["start"]) == ("dull", 11)
    assert 0.5 < answer["probability"] <= 1
    assert found.task.inputs(tmp_path / "a.jsonl")[0][1] == ROWS[0]["context"]
    with pytest.raises(DataError, match=r"reads 2 texts at a time \(question, context\), not 1"):
        found.task.asked(["is it"])


def test_one_window_that_finds_none_is_not_enough(tmp_path: Path, bert: Path) -> None:
    """Of a long context most windows hold no answer: the window that is the least sure of that decides."""
    nothing = row("is meal", "film was good") | {"answers": {"text": [], "answer_start": []}}
    long = row("is room", "the film was good the meal was bad the room was dull", "dull")
    task, rows = prepared(bert, tmp_path, [long, nothing], max_length=12)
    sure = [(0, 0, 9.0), (0, 0, 9.0), (9, 9, 3.0), (0, 0, 9.0)]
    assert task.metrics(EvalPrediction(logits(rows, *sure), None), rows)["exact_match"] == 1
