"""What tasks over files share: photos or recordings that are read when their batch is made."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from ..adapter import HEADS, TaskType
from ..errors import DataError, did_you_mean
from . import collection, columns, models
from .classification import Classification, classes, likely, numbers
from .collection import Media
from .columns import Cells, Say
from .models import Quantization
from .paths import Source
from .task import Data, Piece, Task
from .token_classification import IGNORED, padded

BATCH = 16  # files that are predicted at a time


@dataclass(frozen=True)
class MediaTask(Task):
    """A row is a file and what it is. Encoded rows keep the file: decoded, all of them would fill the memory."""

    endings: ClassVar[frozenset[str]]
    task_type: ClassVar[TaskType | None] = None  # HF PEFT's task types are of models that read tokens
    useless: ClassVar[frozenset[str]] = Task.useless | {"neftune_noise_alpha"}  # noise on the embeddings of tokens

    @abstractmethod
    def decoded(self, file: Media) -> Any:
        """What is in a file. Raises: DataError."""

    @abstractmethod
    def features(self, decoded: Sequence[Any]) -> dict[str, Any]:
        """A batch for the model, of what `decoded` gave."""

    @abstractmethod
    def noise(self) -> list[Any]:
        """What `decoded` might give, made of nothing."""

    @classmethod
    def read(cls, source: Source, split: str, say: Say) -> Any:
        return collection.read(source, cls.endings, split, say)

    @classmethod
    def cell(cls, name: str, value: Any, feature: Any) -> Any:
        return value if name == "file" else columns.text(value, feature)

    def load_model(self, model: str, quantization: Quantization) -> tuple[Any, list[str]]:
        """In float32, as the features are: layers take no other numbers than their own."""
        return models.load(self.auto, model, quantization, self.head(), None, dtype="float32")

    def batch(self, files: Iterable[Media]) -> dict[str, Any]:
        return self.features([self.decoded(file) for file in files])

    def length(self, row: dict[str, Any]) -> int:
        return 1

    def title(self, given: Any) -> Any:
        return collection.title(given)

    def asked(self, texts: Sequence[str]) -> list[Any]:
        """Paths of files."""
        for text in texts:
            path = Path(text)
            if not path.is_file():
                what = "is a folder: give it with --file" if path.is_dir() else "does not exist"
                beside = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
                raise DataError(f"{text} {what}.{did_you_mean(path.name, beside)}")
        return list(texts)

    def inputs(self, path: Path) -> list[Any]:
        """The files in a folder or .zip, or those of a table with the columns trained on."""
        if collection.is_collection(path):
            found = collection.files(path, self.endings)
        else:
            table = self.read(path, "predicted", lambda _: None)
            columns.check(path, table, [self.names["file"]])
            found = [file for file in table[self.names["file"]] if file]
        if not found:
            raise DataError(f"{path} holds no files that end in {', '.join(sorted(self.endings))}.")
        return found


@dataclass(frozen=True)
class MediaClassification(Classification, MediaTask):
    """A file to one of several classes."""

    usual: ClassVar[dict[str, tuple[str, ...]]] = {
        "file": ("file", "file_name", "filename", "image", "img", "audio", "path", "filepath", "id"),
        "label": ("label", "labels", "class", "category", "target", "name"),
    }
    useless: ClassVar[frozenset[str]] = MediaTask.useless - {"class_weights"}

    @classmethod
    def fitted(cls, cells: dict[str, Cells], names: dict[str, str], data: Data, model: str) -> Self:
        labels = classes(cells["train"]["label"], data)
        return cls(names, cls.load_reader(model), labels)

    def load_model(self, model: str, quantization: Quantization) -> tuple[Any, list[str]]:
        """The head is trained also where the model brings one of as many classes: they need not be the same."""
        found, fresh = super().load_model(model, quantization)
        heads = [name for name in HEADS[TaskType.SEQ_CLS] if hasattr(found, name)]
        return found, list(dict.fromkeys([*fresh, *heads]))

    def encoded(self, cells: Cells, split: str, **more: list[Any]) -> Any:
        import datasets

        labels = numbers(cells["label"], self.labels, split)
        return datasets.Dataset.from_dict({"file": cells["file"], "labels": labels, **more})

    def show(self, row: dict[str, Any]) -> list[Piece]:
        return [(collection.title(row["file"]), False), (self.labels[row["labels"]], True)]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        return {**self.batch(row["file"] for row in rows), "labels": torch.tensor([row["labels"] for row in rows])}

    def example(self) -> dict[str, Any]:
        return self.features(self.noise())

    def predict(self, model: Any, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each file the probability of each class."""
        found: list[dict[str, Any]] = []
        for start in range(0, len(inputs), BATCH):
            found += likely(self.labels, model, self.batch(inputs[start : start + BATCH]))
        return found


@dataclass(frozen=True)
class MediaToText(MediaTask):
    """A file to what a model writes of it.

    An encoder-decoder's decoder reads the labels, shifted by the model, which puts its `start` token before them.
    max_length: tokens of a text.
    """

    answer: ClassVar[str] = "text"
    generates: ClassVar[bool] = True

    start: int
    max_length: int

    @property
    def tokenizer(self) -> Any:
        return self.reader.tokenizer

    @abstractmethod
    def labels(self, text: str) -> list[int]:
        """The tokens to write, without `start`."""

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return self.learned(self.batch(row["file"] for row in rows), [row["labels"] for row in rows])

    def learned(self, batch: dict[str, Any], labels: list[list[int]]) -> dict[str, Any]:
        """The batch with the tokens to write."""
        import torch

        width = max(map(len, labels))
        return {**batch, "labels": torch.tensor([padded(row, width, IGNORED, before=False) for row in labels])}

    def written(self, evaluation: Any) -> list[str]:
        import numpy as np

        ids = evaluation.predictions
        return self.texts(np.where(ids == IGNORED, self.tokenizer.pad_token_id, ids))

    def texts(self, ids: Any) -> list[str]:
        plain = [list(map(int, row)) for row in ids]  # Whisper's decodes nothing else
        return [text.strip() for text in self.tokenizer.batch_decode(plain, skip_special_tokens=True)]

    def example(self) -> dict[str, Any]:
        noise, labels = self.noise(), self.labels("one two three")[: self.max_length]
        return self.learned(self.features(noise), [labels] * len(noise))

    def predict(self, model: Any, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """What the model writes for each file."""
        import torch

        found: list[dict[str, Any]] = []
        for start in range(0, len(inputs), BATCH):
            batch = self.batch(inputs[start : start + BATCH])
            with torch.inference_mode():
                ids = self.write(model.eval(), {name: value.to(model.device) for name, value in batch.items()})
            found += [{"text": text} for text in self.texts(ids)]
        return found
