"""Visual question answering: a photo and a text, such as a question about it, to one of several answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from ..errors import ConfigError, DataError
from . import collection, columns, models
from .classification import accuracy, classes, commonest
from .columns import Cells, Say
from .image import ImageTextTask
from .media import BATCH, MediaClassification
from .task import Data, Piece
from .text import WORDS, TextTask


@dataclass(frozen=True)
class VisualQuestionAnswering(ImageTextTask, MediaClassification):
    """A model with a class for each answer, such as ViLT. Its loss is a binary one for each, as if several were right.

    max_length: tokens; longer texts are cut.
    """

    usual: ClassVar[dict[str, tuple[str, ...]]] = {
        "file": ("file", "file_name", "filename", "image", "img", "path", "filepath", "image_id"),
        "text": ("question", "text", "query", "sentence", "caption"),
        "label": ("label", "answer", "labels", "class", "category", "target"),
    }
    reads: ClassVar[frozenset[str]] = frozenset({"max_length"})
    auto: ClassVar[str] = "AutoModelForVisualQuestionAnswering"
    cross_entropy: ClassVar[bool] = False  # a binary one for each class

    max_length: int

    @classmethod
    def fitted(cls, cells: dict[str, Cells], names: dict[str, str], data: Data, model: str) -> Self:
        from transformers import AutoConfig

        with models.loading(model):
            kind = AutoConfig.from_pretrained(model).model_type
        if kind != "vilt":
            raise ConfigError(f"{model} is a {kind} model, which has no class for each answer, as ViLT has.")
        labels = classes(cells["train"]["label"], data)
        reader = cls.load_reader(model)
        return cls(names, reader, labels, TextTask.limit(data, model, reader.tokenizer))

    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        self.check(cells["file"])
        if cut := sum(len(ids) > self.max_length for ids in self.reader.tokenizer(cells["text"]).input_ids):
            say(f"{split}: {cut} of {len(cells['text'])} texts cut to {self.max_length} tokens")
        return self.encoded(cells, split, text=cells["text"])

    def show(self, row: dict[str, Any]) -> list[Piece]:
        return [(collection.title(row["file"]), False), (row["text"], False), (self.labels[row["labels"]], True)]

    def read_both(self, images: Sequence[Any], texts: Sequence[str]) -> dict[str, Any]:
        settings = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        return {**self.features(images), **self.reader.tokenizer(list(texts), **settings)}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        batch = self.read_both([self.decoded(row["file"]) for row in rows], [row["text"] for row in rows])
        labels = torch.tensor([row["labels"] for row in rows])
        return {**batch, "labels": torch.nn.functional.one_hot(labels, len(self.labels)).float()}

    def metrics(self, evaluation: Any, rows: Any) -> dict[str, float]:
        return accuracy(rows["labels"], evaluation.predictions.argmax(-1))

    def baseline(self, train: Any, rows: Any) -> dict[str, float]:
        return commonest(train, rows)

    def example(self) -> dict[str, Any]:
        noise = self.noise()
        return self.read_both(noise, [" ".join(WORDS[: n + 1]) for n in range(len(noise))])

    def asked(self, texts: Sequence[str]) -> list[Any]:
        """Pairs of a file's path and a text."""
        if len(texts) % 2:
            raise DataError(f"This task reads 2 things at a time (file, text), not {len(texts)}.")
        return list(zip(super().asked(texts[::2]), texts[1::2], strict=True))

    def inputs(self, path: Path) -> list[Any]:
        """The files and texts of a table with the columns trained on; or of a folder or .zip with such a table."""
        table = self.read(path, "predicted", lambda _: None)
        wanted = {name: self.names[name] for name in ("file", "text")}
        columns.check(path, table, wanted.values())
        cells = [[self.cell(name, value, None) for value in table[column]] for name, column in wanted.items()]
        return list(zip(*cells, strict=True))

    def title(self, given: Any) -> Any:
        return (collection.title(given[0]), given[1])

    def predict(self, model: Any, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each photo and text the probability of each answer by itself: they need not sum to 1."""
        import torch

        found: list[dict[str, Any]] = []
        for start in range(0, len(inputs), BATCH):
            some = inputs[start : start + BATCH]
            batch = self.read_both([self.decoded(file) for file, _ in some], [text for _, text in some])
            with torch.inference_mode():
                scores = model.eval()(**{name: value.to(model.device) for name, value in batch.items()}).logits
            for row in scores.float().sigmoid().tolist():
                named = dict(zip(self.labels, row, strict=True))
                found.append({"label": max(named, key=named.__getitem__), "probabilities": named})
        return found
