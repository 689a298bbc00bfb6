"""Extractive question answering: the span of a context that answers a question, as in SQuAD.

A long context is read in windows that overlap, so that most answers are whole in one of them. Over all windows of a row

    answer = argmax_{i <= j < i + 30} start_i + end_j        (Devlin et al. 2019, section 4.2, 4.3)

with the logits of the first and last token of a span; where training rows have no answer, the first token's logits
stand for that, as there. The scores are those of SQuAD's own script (Rajpurkar et al. 2018).
"""

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from .. import watch
from ..adapter import TaskType
from ..errors import ConfigError, DataError
from . import columns
from .cleaning import Reason
from .columns import Cells, Say
from .task import Data, Piece
from .text import WORDS, TextTask

ANSWER = 30  # tokens of the longest answer that is looked for
OUTSIDE = [-1, -1]  # the characters of a token that is not of the context
FOR_SCORES = ("row", "spans", "context", "answers")  # columns that the model does not read

Span = tuple[int, int]


@dataclass(frozen=True)
class QuestionAnswering(TextTask):
    """A question takes at most a third of a window, and windows overlap by a third.

    unanswerable: training rows without an answer taught the model to find none.
    """

    usual: ClassVar[dict[str, tuple[str, ...]]] = {
        "question": ("question", "query"),
        "context": ("context", "passage", "paragraph", "document"),
        "answers": ("answers", "answer"),
    }
    answer: ClassVar[str] = "answers"
    drops: ClassVar[frozenset[Reason]] = TextTask.drops - {"too_long"}  # a long context is read in windows
    task_type: ClassVar[TaskType] = TaskType.QUESTION_ANS
    auto: ClassVar[str] = "AutoModelForQuestionAnswering"
    metric: ClassVar[str] = "f1"
    # Of no use is what is about one label: here there are two, a start and an end.
    cross_entropy: ClassVar[bool] = False  # two of them, of where an answer starts and ends

    unanswerable: bool

    @classmethod
    def cell(cls, name: str, value: Any, feature: Any) -> Any:
        if name == "context":  # as it is, for answers are found by counting its characters
            return value if value and value.strip() else ""
        if name == "question" or value is None:
            return columns.text(value, feature)
        try:
            pairs = list(zip(value["text"], value["answer_start"], strict=True))
        except (TypeError, KeyError, ValueError):
            raise DataError(
                f"Answers are {{text: [...], answer_start: [...]}}, both empty where there is none, not "
                f"{str(value)[:80]!r}."
            ) from None
        kept = [(text, start) for text, start in pairs if text.strip()]
        return {"text": [text for text, _ in kept], "answer_start": [start for _, start in kept]}

    @classmethod
    def fitted(cls, cells: dict[str, Cells], names: dict[str, str], data: Data, model: str) -> Self:
        for split, found in cells.items():
            for context, answers in zip(found["context"], found["answers"], strict=True):
                for text, start in zip(*answers.values(), strict=True):
                    there = context[start : start + len(text)]
                    if there != text:
                        raise DataError(
                            f"{split}: the answer {text!r} should start at character {start} of the context that "
                            f"starts {context[:40]!r}; there is {there!r}."
                        )
        tokenizer = cls.load_reader(model)
        if not tokenizer.is_fast:
            raise ConfigError(f"The tokenizer of {model} does not say which characters a token is of: no fast one.")
        limit = cls.limit(data, model, tokenizer)
        if limit - 2 * (limit // 3) <= tokenizer.num_special_tokens_to_add(pair=True):
            raise ConfigError(f"data.max_length={limit} leaves a context no room beside its question.")
        return cls(names, tokenizer, limit, any(not answers["text"] for answers in cells["train"]["answers"]))

    def head(self) -> dict[str, Any]:
        return {"num_labels": 2}  # start and end

    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        import datasets

        with watch.busy(f"Tokenizing {split}"):
            encoded, rows, spans = self._windows(cells["question"], cells["context"])
        cut = sum(len(ids) > self.max_length // 3 for ids in self._ids(cells["question"]))
        if cut:
            say(f"{split}: {cut} questions cut to {self.max_length // 3} tokens")
        say(f"{split}: {len(set(rows))} rows in {len(rows)} windows of up to {self.max_length} tokens")
        answers = [cells["answers"][row] for row in rows]
        tokens = [_tokens(window, **given) for window, given in zip(spans, answers, strict=True)]
        lost = {row for row, given in zip(rows, answers, strict=True) if given["text"]}
        lost -= {row for row, found in zip(rows, tokens, strict=True) if found}
        if lost:
            say(f"{split}: {len(lost)} answers are in no window as a whole; there the model learns to find none")
        if split == "train" and not any(tokens):
            raise DataError(
                f"train: no window of {self.max_length} tokens holds an answer, so nothing can be learned. The last "
                f"row: {self.reader.decode(encoded['input_ids'][-1])!r}"
            )
        positions = [found or (self._none(ids),) * 2 for found, ids in zip(tokens, encoded["input_ids"], strict=True)]
        return datasets.Dataset.from_dict(
            {
                **encoded,
                "start_positions": [start for start, _ in positions],
                "end_positions": [end for _, end in positions],
                "row": rows,
                "spans": spans,
                "context": [cells["context"][row] for row in rows],
                "answers": [given["text"] for given in answers],
            }
        )

    def _windows(
        self, questions: Sequence[str], contexts: Sequence[str]
    ) -> tuple[dict[str, Any], list[int], list[list[list[int]]]]:
        """What the model reads, and of each window its row and the characters of the context that its tokens are of."""
        third = self.max_length // 3
        short = self.reader(
            list(questions), add_special_tokens=False, truncation=True, max_length=third, return_offsets_mapping=True
        )
        asked = [
            text[: offsets[-1][1]] if offsets else text
            for text, offsets in zip(questions, short["offset_mapping"], strict=True)
        ]
        encoded = self.tokenized(
            asked, list(contexts), stride=third, return_overflowing_tokens=True, return_offsets_mapping=True
        )
        spans = [
            [list(span) if part == 1 else OUTSIDE for span, part in zip(offsets, encoded.sequence_ids(i), strict=True)]
            for i, offsets in enumerate(encoded["offset_mapping"])
        ]
        read = {name: encoded[name] for name in encoded if name in self.reader.model_input_names}
        return read, encoded["overflow_to_sample_mapping"], spans

    def tokenized(self, *texts: Any, **settings: Any) -> Any:
        return self.reader(*texts, truncation="only_second", max_length=self.max_length, **settings)

    def _ids(self, questions: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self.reader(list(questions), add_special_tokens=False).input_ids
        return found

    def _none(self, ids: Sequence[int]) -> int:
        """The token of a window that stands for no answer: BERT's [CLS], or the first."""
        return list(ids).index(self.reader.cls_token_id) if self.reader.cls_token_id in ids else 0

    def show(self, row: dict[str, Any]) -> list[Piece]:
        ids, start, end = row["input_ids"], row["start_positions"], row["end_positions"] + 1
        parts = [(ids[:start], False), (ids[start:end], True), (ids[end:], False)]
        return [(self.reader.decode(part), learned) for part, learned in parts if part]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        read = [{name: value for name, value in row.items() if name not in FOR_SCORES} for row in rows]
        return dict(self.reader.pad(read, padding_side="right", return_tensors="pt"))  # so that positions stay

    def reduced(self, logits: Any, labels: Any) -> Any:
        return logits[:2]  # an encoder-decoder gives more

    def metrics(self, evaluation: Any, rows: Any) -> dict[str, float]:
        """Exact match and F1, the mean over rows of the best among a row's answers."""
        starts, ends = evaluation.predictions
        nones = [self._none(ids) for ids in rows["input_ids"]]
        found = self._found(starts, ends, rows["row"], rows["spans"], nones)
        given = dict(zip(rows["row"], zip(rows["context"], rows["answers"], strict=True), strict=True))
        pairs = [(given[row][0][start:end], given[row][1] or [""]) for row, ((start, end), _) in found.items()]
        return {
            "exact_match": sum(max(exact(guess, answer) for answer in known) for guess, known in pairs) / len(pairs),
            "f1": sum(max(f1(guess, answer) for answer in known) for guess, known in pairs) / len(pairs),
        }

    def _found(
        self, starts: Any, ends: Any, rows: Iterable[int], spans: Iterable[Any], nones: Iterable[int]
    ) -> dict[int, tuple[Span, float]]:
        """By row the characters of the likeliest answer, and its probability among all; (0, 0) is none."""
        import numpy as np

        windows: dict[int, list[tuple[float, Span, float, float]]] = {}
        for row, window, none, start, end in zip(rows, spans, nones, starts, ends, strict=True):
            windows.setdefault(row, []).append((*_likeliest(start, end, window), float(start[none] + end[none])))
        found = {}
        for row, candidates in windows.items():
            best, span, _, _ = max(candidates)
            totals = [total for _, _, total, _ in candidates]
            if self.unanswerable:
                nothing = min(none for *_, none in candidates)  # that of the window that is the least sure of it
                best, span = max((best, span), (nothing, (0, 0)))
                totals.append(nothing)
            found[row] = (span, math.exp(best - np.logaddexp.reduce(totals)))
        return found

    def example(self) -> dict[str, Any]:
        texts = [" ".join(WORDS[:n]) for n in range(1, len(WORDS) + 1)]
        encoded, rows, _ = self._windows(texts, texts[::-1])
        return self.collate([{name: values[i] for name, values in encoded.items()} for i in range(len(rows))])

    def predict(self, model: Any, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each question with its context the answer, where it starts in the context, and its probability."""
        import torch

        encoded, rows, spans = self._windows([asked for asked, _ in inputs], [context for _, context in inputs])
        starts: list[Any] = []
        ends: list[Any] = []
        for some in self.batches(range(len(rows))):
            batch = self.collate([{name: values[i] for name, values in encoded.items()} for i in some])
            with torch.inference_mode():
                out = model.eval()(**{name: value.to(model.device) for name, value in batch.items()})
            starts.extend(out.start_logits.float().cpu().numpy())
            ends.extend(out.end_logits.float().cpu().numpy())
        found = self._found(starts, ends, rows, spans, map(self._none, encoded["input_ids"]))
        answers = []
        for (_, context), ((start, end), likely) in zip(inputs, (found[i] for i in range(len(inputs))), strict=True):
            place = start if end else None
            answers.append({"answer": context[start:end], "start": place, "probability": likely})
        return answers


def _tokens(spans: list[list[int]], text: list[str], answer_start: list[int]) -> Span | None:
    """The first and last token of the first answer, if this window holds it whole."""
    if not text:
        return None
    end = answer_start[0] + len(text[0].rstrip())
    start = answer_start[0] + len(text[0]) - len(text[0].lstrip())
    inside = [i for i, (first, last) in enumerate(spans) if first < end and last > start]
    if not inside or spans[inside[0]][0] > start or spans[inside[-1]][1] < end:
        return None
    return inside[0], inside[-1]


def _likeliest(start: Any, end: Any, spans: list[list[int]]) -> tuple[float, Span, float]:
    """A window's best score, the characters it is of, and log sum exp of the scores of all its spans."""
    import numpy as np

    inside = [i for i, (first, _) in enumerate(spans) if first >= 0]
    if not inside:  # the tokenizer left nothing of the context
        return -1e9, (0, 0), -1e9
    first, size = inside[0], len(inside)
    ends = np.concatenate([end[first : first + size], np.full(ANSWER - 1, -np.inf)])
    scores = start[first : first + size, None] + np.lib.stride_tricks.sliding_window_view(ends, ANSWER)  # (i, j - i)
    i, more = np.unravel_index(scores.argmax(), scores.shape)
    span = (spans[first + i][0], spans[first + i + more][1])
    return float(scores[i, more]), span, float(np.logaddexp.reduce(scores, axis=None))


def normalised(text: str) -> str:
    """In lower case, without punctuation, articles and more than single spaces."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact(guess: str, answer: str) -> float:
    return float(normalised(guess) == normalised(answer))


def f1(guess: str, answer: str) -> float:
    """Of the words in common, with repetitions; of nothing with nothing 1."""
    guessed, wanted = normalised(guess).split(), normalised(answer).split()
    if not guessed or not wanted:
        return float(guessed == wanted)
    common = (Counter(guessed) & Counter(wanted)).total()
    return 2 * common / (len(guessed) + len(wanted))
