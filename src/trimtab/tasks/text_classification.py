"""Text classification: one text, or a pair of them, to one of several classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..adapter import TaskType
from .classification import Classification, classes, likely, numbers
from .cleaning import Reason
from .columns import Cells, Say
from .task import Data, Piece
from .text import TextTask


@dataclass(frozen=True)
class TextClassification(Classification, TextTask):
    usual: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": ("text", "sentence", "review", "content", "document", "sentence1", "premise", "question1", "question"),
        "text_pair": ("text_pair", "sentence2", "hypothesis", "question2"),
        "label": ("label", "labels", "class", "category", "sentiment", "polarity", "target", "intent", "topic"),
    }
    optional: ClassVar[frozenset[str]] = frozenset({"text_pair"})
    reads: ClassVar[frozenset[str]] = TextTask.reads | {"augment"}
    augmented: ClassVar[tuple[str, ...]] = ("text", "text_pair")
    drops: ClassVar[frozenset[Reason]] = TextTask.drops | {"conflicting"}
    task_type: ClassVar[TaskType] = TaskType.SEQ_CLS
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    useless: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def fitted(cls, cells: dict[str, Cells], names: dict[str, str], data: Data, model: str) -> Self:
        labels = classes(cells["train"]["label"], data)
        tokenizer = cls.load_reader(model)
        return cls(names, tokenizer, cls.limit(data, model, tokenizer), labels)

    def too_long(self, cells: Cells) -> set[int]:
        return self.longer(cells["text"], cells.get("text_pair"))

    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        import datasets

        encoded = self.tokenized(cells["text"], cells.get("text_pair"))
        self.say_cut(encoded, split, say)
        labels = numbers(cells["label"], self.labels, split)
        return datasets.Dataset.from_dict({**encoded, "labels": labels})

    def show(self, row: dict[str, Any]) -> list[Piece]:
        return [(self.reader.decode(row["input_ids"]), False), (self.labels[row["labels"]], True)]

    def predict(self, model: Any, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each text, or pair of them, the probability of each class."""
        found: list[dict[str, Any]] = []
        for texts in self.batches(inputs):
            batch = self.tokenized(list(texts), padding=True, return_tensors="pt")
            found += likely(self.labels, model, batch)
        return found
