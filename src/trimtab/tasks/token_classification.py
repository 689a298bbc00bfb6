"""Token classification: a class for each word, such as named entities in BIO tags."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from ..adapter import TaskType
from ..errors import DataError
from . import columns, rows
from .classification import classifier, numbers
from .cleaning import Reason
from .columns import Cells, Say
from .task import Data, Piece
from .text import WORDS, TextTask

IGNORED = -100  # PyTorch's label of what no loss is of


@dataclass(frozen=True)
class TokenClassification(TextTask):
    """`labels` are the tags in the order of the model's outputs. A word's tag is learned at its first token."""

    usual: ClassVar[dict[str, tuple[str, ...]]] = {
        "tokens": ("tokens", "words", "sentence", "text"),
        "tags": ("tags", "ner_tags", "labels", "pos_tags", "chunk_tags", "label"),
    }
    answer: ClassVar[str] = "tags"
    drops: ClassVar[frozenset[Reason]] = TextTask.drops | {"conflicting"}
    task_type: ClassVar[TaskType] = TaskType.TOKEN_CLS
    auto: ClassVar[str] = "AutoModelForTokenClassification"
    metric: ClassVar[str] = "f1"
    useless: ClassVar[frozenset[str]] = frozenset()

    labels: list[str]

    @classmethod
    def cell(cls, name: str, value: Any, feature: Any) -> Any:
        """A list of words or tags; a text is one with spaces between them."""
        inner = getattr(feature, "feature", feature)
        values = value.split() if isinstance(value, str) else value or []
        return [columns.text(part, inner) for part in values]

    @classmethod
    def fitted(cls, cells: dict[str, Cells], names: dict[str, str], data: Data, model: str) -> Self:
        for split, found in cells.items():
            for words, tags in zip(found["tokens"], found["tags"], strict=True):
                if len(words) != len(tags):
                    start = " ".join(words[:6])
                    raise DataError(
                        f"{split}: {len(words)} words have {len(tags)} tags in the row that starts {start!r}."
                    )
        known = {tag for tags in cells["train"]["tags"] for tag in tags}
        if len(known) < 2:
            raise DataError(f"{data.train} has one tag only, {known.pop()!r}: there is nothing to tell apart.")
        tokenizer = cls.load_reader(model)
        return cls(names, tokenizer, cls.limit(data, model, tokenizer), sorted(known))

    def too_long(self, cells: Cells) -> set[int]:
        return self.longer(cells["tokens"], is_split_into_words=True)

    def head(self) -> dict[str, Any]:
        return classifier(self.labels)

    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        import datasets

        encoded = self.tokenized(cells["tokens"], is_split_into_words=True)
        self.say_cut(encoded, split, say)
        labels = []
        for i, tags in enumerate(cells["tags"]):
            words = encoded.word_ids(i)
            first = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
            known = numbers(tags, self.labels, split)
            labels.append([known[word] if begins else IGNORED for word, begins in zip(words, first, strict=True)])
        return datasets.Dataset.from_dict({**encoded, "labels": labels})

    def show(self, row: dict[str, Any]) -> list[Piece]:
        pieces: list[Piece] = []
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            pieces.append((self.reader.decode([token]), False))
            if label != IGNORED:
                pieces.append((self.labels[label], True))
        return pieces

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        batch = self.reader.pad([{k: v for k, v in row.items() if k != "labels"} for row in rows], return_tensors="pt")
        width, before = batch["input_ids"].shape[1], self.reader.padding_side == "left"
        return {**batch, "labels": torch.tensor([padded(row["labels"], width, IGNORED, before) for row in rows])}

    def reduced(self, logits: Any, labels: Any) -> Any:
        return logits.argmax(-1)

    def metrics(self, evaluation: Any, rows: Any) -> dict[str, float]:
        """F1, precision and recall of entities (whole spans of BIO tags, as conlleval counts them)."""
        pairs = list(zip(evaluation.label_ids, evaluation.predictions, strict=True))
        return _scores(
            [[self.labels[label] for label in truth if label != IGNORED] for truth, _ in pairs],
            [[self.labels[tag] for label, tag in zip(*pair, strict=True) if label != IGNORED] for pair in pairs],
        )

    def example(self) -> dict[str, Any]:
        rows = [WORDS[:n] for n in range(1, len(WORDS) + 1)]
        return dict(self.reader.pad(self.tokenized(rows, is_split_into_words=True), return_tensors="pt"))

    def inputs(self, path: Path) -> list[Any]:
        if path.suffix == ".txt":
            return [line.split() for line in rows.lines(path)]
        found = rows.read(path)
        columns.check(path, found, [self.names["tokens"]])
        return [self.cell("tokens", value, None) for value in found[self.names["tokens"]]]

    def predict(self, model: Any, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each text (words, or one text that is split at spaces) the entities in it, or else the tags."""
        import torch
        from seqeval.metrics.sequence_labeling import get_entities

        found: list[dict[str, Any]] = []
        for texts in self.batches(inputs):
            words = [text.split() if isinstance(text, str) else list(text) for text in texts]
            batch = self.tokenized(words, is_split_into_words=True, padding=True, return_tensors="pt")
            with torch.inference_mode():
                guess = model.eval()(**batch.to(model.device)).logits.argmax(-1).tolist()
            for i, row in enumerate(words):
                tags: dict[int, str] = {}
                for word, label in zip(batch.word_ids(i), guess[i], strict=True):
                    if word is not None:
                        tags.setdefault(word, self.labels[label])
                tagged = [tags.get(word, "O") for word in range(len(row))]
                entities = [
                    {"type": kind, "text": " ".join(row[start : end + 1])} for kind, start, end in get_entities(tagged)
                ]
                found.append({"entities": entities, "tags": tagged})
        return found


def padded(values: list[int], width: int, value: int, before: bool) -> list[int]:
    gap = [value] * (width - len(values))
    return gap + values if before else values + gap


def _scores(truth: list[list[str]], guess: list[list[str]]) -> dict[str, float]:
    import warnings

    from seqeval.metrics import f1_score, precision_score, recall_score
    from sklearn.metrics import accuracy_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a tag is no BIO tag, or a class never guessed
        found = {
            "f1": f1_score(truth, guess, zero_division=0),
            "precision": precision_score(truth, guess, zero_division=0),
            "recall": recall_score(truth, guess, zero_division=0),
        }
    flat = [[tag for row in rows for tag in row] for rows in (truth, guess)]
    return {**{name: float(value) for name, value in found.items()}, "accuracy": float(accuracy_score(*flat))}
