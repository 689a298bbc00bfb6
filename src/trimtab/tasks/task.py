"""The contract: what a task knows about its data and its model (`Task`), and where the data are (`Data`)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationInfo

from ..adapter import TaskType

Quantization = Literal["none", "int8", "nf4"]
Say = Callable[[str], object]  # tells the user one line


def _from_recipe(path: Path, info: ValidationInfo) -> Path:
    folder: Path = (info.context or {}).get("folder", Path.cwd())
    return (folder / path.expanduser()).absolute()


RecipePath = Annotated[Path, AfterValidator(_from_recipe)]  # absolute, or relative to the recipe's folder


class Data(BaseModel):
    """The files with the rows, and how to read them.

    validation: a file, or the fraction of the training rows that is set aside. columns: the task's name of a column
    -> its name in the files; guessed where not given. max_length: tokens; longer rows are cut.
    """

    model_config = ConfigDict(extra="forbid")

    train: RecipePath
    validation: Annotated[StrictFloat, Field(gt=0, lt=1)] | RecipePath = 0.1
    test: RecipePath | None = None
    columns: dict[str, str] = {}
    max_length: Annotated[StrictInt, Field(ge=1)] | None = None


class Task(ABC):
    """One kind of problem: its columns, features, model class, metrics."""

    columns: ClassVar[tuple[str, ...]]  # the names that `data.columns` may map
    task_type: ClassVar[TaskType]
    metric: ClassVar[str]  # chooses the best checkpoint; higher is better
    names: dict[str, str]  # data.columns, completed

    @classmethod
    @abstractmethod
    def from_data(cls, data: Data, model: str, seed: int, say: Say) -> tuple[Self, dict[str, Any]]:
        """The task as these files define it, and its tokenized rows: a `datasets.Dataset` each for "train",
        "validation" and, where given, "test".

        Raises:
            DataError: files that cannot be read, or hold nothing to learn from.
        """

    @classmethod
    @abstractmethod
    def from_folder(cls, folder: Path) -> Self:
        """The task of a finished run, as `save` left it."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what prediction needs beside the adapter: tokenizer, labels."""

    @abstractmethod
    def load_model(self, model: str, quantization: Quantization) -> tuple[Any, list[str]]:
        """The pretrained model for this task, and the names of its modules that are new and must be trained.

        Raises:
            ConfigError: no such model, or one that does not fit the task.
        """

    @abstractmethod
    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of tokenized rows as the model's keyword arguments."""

    @abstractmethod
    def metrics(self, evaluation: Any) -> dict[str, float]:
        """Scores of a `transformers.EvalPrediction`."""

    @abstractmethod
    def baseline(self, train: Any, rows: Any) -> dict[str, float]:
        """The same scores for the best guess that ignores the input."""

    @abstractmethod
    def example(self) -> dict[str, Any]:
        """A batch to compare two models on, made of the task alone."""

    @abstractmethod
    def inputs(self, path: Path) -> list[Any]:
        """What a file asks to be predicted. Raises: DataError."""

    @abstractmethod
    def predict(self, model: Any, inputs: Sequence[Any]) -> list[dict[str, float]]:
        """For each input the possible answers and their probabilities."""
