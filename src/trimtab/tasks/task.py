"""The contract: what a task knows about its data and its model (`Task`), and where the data are (`Data`)."""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

from ..adapter import TaskType
from ..errors import CheckpointError, ConfigError
from . import augmentation, cleaning, columns, models
from .augmentation import Augmenter
from .columns import Cells, Say
from .models import Quantization
from .paths import HubDataset, Source

SAVED = "task.json"
Piece = tuple[str, bool]


class Data(BaseModel):
    """The files with the rows, or datasets of the hub, and how to read them.

    validation: a file or dataset, or the fraction of the training rows that is set aside. columns: the task's name of
    a column -> its name in the files; guessed where not given.

    The rest are of use to some tasks only (`Task.reads`). max_length: tokens; longer rows are cut. prefix: goes before
    each text that is read. packing: rows share blocks of max_length tokens in training (packing.py). drop: which rows
    are not trained on, beside those with empty cells (cleaning.py). augment: copies of training rows with other words
    (augmentation.py).
    """

    model_config = ConfigDict(extra="forbid")

    train: Source
    validation: Annotated[StrictFloat, Field(gt=0, le=1)] | Source = 0.1
    test: Source | None = None
    columns: dict[str, str] = {}
    max_length: Annotated[StrictInt, Field(ge=1)] | None = None
    prefix: str | None = None
    packing: StrictBool | None = None
    drop: list[cleaning.Reason] | None = None
    augment: augmentation.Augment | None = None

    @property
    def sources(self) -> dict[str, Source]:
        """Where the rows are, by split."""
        given = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: source for split, source in given.items() if isinstance(source, Path | HubDataset)}


FILES = frozenset({"train", "validation", "test", "columns"})  # the keys of data that are of use to all tasks


@dataclass(frozen=True)
class Task(ABC):
    """One kind of problem: its columns, features, model class, metrics.

    A task is what its files and its base model made of it: `names` is data.columns, completed; `reader` is the
    model's tokenizer, feature extractor or processor.
    """

    usual: ClassVar[dict[str, tuple[str, ...]]]  # the task's columns, and how they are usually called, best first
    optional: ClassVar[frozenset[str]] = frozenset()
    answer: ClassVar[str]  # the column that is learned from the others
    reads: ClassVar[frozenset[str]] = frozenset()  # the keys of data beside FILES that are of use to it
    drops: ClassVar[frozenset[cleaning.Reason]] = frozenset()  # what of data.drop is
    augmented: ClassVar[tuple[str, ...]] = ()  # columns with texts whose words may change under the same answer
    useless: ClassVar[frozenset[str]] = frozenset({"class_weights"})  # the keys of training that are of no use to it
    cross_entropy: ClassVar[bool] = True  # the loss is that, of logits (..., C) and labels (...)
    task_type: ClassVar[TaskType | None]
    auto: ClassVar[str]  # the name of transformers' Auto class
    metric: ClassVar[str]  # chooses the best checkpoint
    higher_is_better: ClassVar[bool] = True
    generates: ClassVar[bool] = False  # scores are of what the model writes, not of its logits
    divides_loss: ClassVar[bool] = False  # the model divides by the labels of all accumulated batches, when told them

    names: dict[str, str]
    reader: Any

    @classmethod
    def from_data(
        cls, data: Data, model: str, seed: int, say: Say, augmenters: Sequence[Augmenter] = ()
    ) -> tuple[Self, dict[str, Any]]:
        """The task as these files define it, and its rows as the model reads them: a `datasets.Dataset` each for
        "train", "validation" and, where given, "test".

        Args:
            augmenters: beside those of data.augment.
        Raises:
            DataError: files that cannot be read, or hold nothing to learn from.
        """
        if data.augment:
            augmenters = [*augmentation.augmenters(data.augment, seed), *augmenters]
        if augmenters and not cls.augmented:
            raise ConfigError(
                f"{cls.__name__} has no texts whose words may change under the same answer: no augmenter."
            )
        drop = data.drop or ()
        raw = {split: cls.read(source, split, say) for split, source in data.sources.items()}
        names = cls.named(raw["train"], data)
        if guessed := [f"{column} is the {name}" for name, column in names.items() if name not in data.columns]:
            say(f"Columns guessed: {', '.join(guessed)} (data.columns changes this)")
        cells = {
            split: columns.clean(data.sources[split], found, names, cls.cell, cls.needed(names), split, say)
            for split, found in raw.items()
        }
        train = cells.pop("train")
        if "duplicate" in drop:
            train = cleaning.without(train, cleaning.duplicate(train), "duplicate", say)
        if "conflicting" in drop:
            train = cleaning.without(train, cleaning.conflicting(train, cls.answer), "conflicting", say)
        if isinstance(data.validation, float):
            train, cells["validation"] = cls.split(train, data.validation, seed)
        leaked = cleaning.leaked(train, cells, cls.answer, say)
        if "leaked" in drop:
            train = cleaning.without(train, leaked, "leaked", say)
        task = cls.fitted({"train": train, **cells}, names, data, model)
        if "too_long" in drop:
            train = cleaning.without(train, task.too_long(train), "too_long", say)
        if augmenters:
            train = augmentation.augmented(train, cls.augmented, augmenters, say)
        cells = {"train": train, **cells}
        return task, {split: task.encode(found, split, say) for split, found in cells.items()}

    def rows(self, path: Path, say: Say) -> Any:
        """The rows of one more file, with the columns trained on, as the model reads them. Raises: DataError."""
        found = self.read(path, path.name, say)
        cells = columns.clean(path, found, self.names, self.cell, self.needed(self.names), path.name, say)
        return self.encode(cells, path.name, say)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The task of a finished run, as `save` left it."""
        if not (folder / SAVED).is_file():
            raise CheckpointError(f"{folder} was not written by `trimtab train`: there is no {SAVED} in it.")
        reader = cls.load_reader(str(folder))
        try:
            return cls(reader=reader, **json.loads((folder / SAVED).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{folder / SAVED} is damaged: {error}.") from None

    def save(self, folder: Path) -> None:
        """Write what prediction needs beside the adapter: how the model reads, labels."""
        self.reader.save_pretrained(folder)
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del known["reader"]
        (folder / SAVED).write_text(json.dumps(known, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, source: Source, split: str, say: Say) -> Any:
        """The rows of a file, a folder or a dataset, as a `datasets.Dataset`."""
        from . import rows

        return rows.read(source)

    @classmethod
    def split(cls, cells: Cells, fraction: float, seed: int) -> tuple[Cells, Cells]:
        """Rows to train on, and a fraction set aside. Raises: DataError."""
        return columns.split(cells, fraction, seed)

    @classmethod
    def load_reader(cls, model: str) -> Any:
        return models.tokenizer(model)

    @classmethod
    def named(cls, found: Any, data: Data) -> dict[str, str]:
        """data.columns with those that it does not name, by their usual names. Raises: DataError."""
        return cls.chosen(columns.complete(found, data, cls.usual, cls.optional), data)

    @classmethod
    def unsuited(cls, found: Any, names: dict[str, str]) -> str:
        """Why rows with these columns are for another task, or ''."""
        return ""

    @classmethod
    def chosen(cls, names: dict[str, str], data: Data) -> dict[str, str]:
        """Of the columns that are there, those to use. Raises: DataError."""
        return names

    @classmethod
    def needed(cls, names: dict[str, str]) -> list[str]:
        """The columns of which a row must have all."""
        return [name for name in names if name not in cls.optional]

    @classmethod
    def cell(cls, name: str, value: Any, feature: Any) -> Any:
        """A value of one of the task's columns as the task wants it; what is empty drops the row."""
        return columns.text(value, feature)

    @classmethod
    @abstractmethod
    def fitted(cls, cells: dict[str, Cells], names: dict[str, str], data: Data, model: str) -> Self:
        """The task that these rows, by split, define. Raises: DataError."""

    @abstractmethod
    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        """Rows as the model reads them, a `datasets.Dataset`."""

    def too_long(self, cells: Cells) -> set[int]:
        """The rows of which `encode` would cut something off."""
        raise NotImplementedError

    def head(self) -> dict[str, Any]:
        """What the model's config is told of the task."""
        return {}

    def load_model(self, model: str, quantization: Quantization) -> tuple[Any, list[str]]:
        """The pretrained model for this task, and the names of its modules that are new and must be trained.

        Raises:
            ConfigError: no such model, or one that does not fit the task.
        """
        return models.load(self.auto, model, quantization, self.head(), getattr(self.reader, "pad_token_id", None))

    def outline(self, model: str) -> Any:
        """That model on the meta device: no weights are loaded. Raises: ConfigError."""
        return models.outline(self.auto, model, self.head())

    def tokens(self) -> list[int]:
        """Ids of tokens whose embeddings are trained, beside what the method trains."""
        return []

    @abstractmethod
    def show(self, row: dict[str, Any]) -> list[Piece]:
        """An encoded row as people read it, piece by piece, and which pieces are learned."""

    @abstractmethod
    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of encoded rows as the model's keyword arguments."""

    def count(self, rows: Any) -> int:
        """The rows of the file that encoded rows are of: of those in a column `row`, or one each."""
        return len(set(rows["row"])) if "row" in rows.column_names else len(rows)

    def length(self, row: dict[str, Any]) -> int:
        """How much memory an encoded row takes, in any unit."""
        return len(row["input_ids"])

    def reduced(self, logits: Any, labels: Any) -> Any:
        """What `metrics` needs of a batch's logits: all of them would not fit where there is one for each token."""
        return logits

    def write(self, model: Any, batch: dict[str, Any]) -> Any:
        """Token ids (B, T) of what the model writes for a batch, of which it does not see the labels."""
        given = {name: value for name, value in batch.items() if name != "labels"}
        return model.generate(**given, generation_config=model.generation_config)

    @abstractmethod
    def metrics(self, evaluation: Any, rows: Any) -> dict[str, float]:
        """Scores of a `transformers.EvalPrediction` of encoded rows."""

    def baseline(self, train: Any, rows: Any) -> dict[str, float]:
        """The same scores for the best guess that ignores the input, where there is such a guess."""
        return {}

    @abstractmethod
    def example(self) -> dict[str, Any]:
        """A batch to compare two models on, made of the task alone."""

    @abstractmethod
    def inputs(self, path: Path) -> list[Any]:
        """What a file asks to be predicted. Raises: DataError."""

    def asked(self, texts: Sequence[str]) -> list[Any]:
        """What single texts ask to be predicted. Raises: DataError."""
        return list(texts)

    def title(self, given: Any) -> Any:
        """What `inputs` or `asked` gave, as people and JSON know it."""
        return given

    @abstractmethod
    def predict(self, model: Any, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each input an answer: JSON values by name."""
