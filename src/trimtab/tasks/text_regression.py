"""Text regression: one text, or a pair of them, to a number, such as a price. Scores: RMSE and MAE."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..adapter import TaskType
from ..errors import DataError
from . import columns
from .cleaning import Reason
from .columns import Cells, Say
from .task import Data, Piece
from .text import TextTask


@dataclass(frozen=True)
class TextRegression(TextTask):
    """The model's one output is z = (y - mean) / deviation, for labels y with that mean and deviation in training.

    So one learning rate does for all units. The loss is the mean of (z' - z)^2; scores and answers are in units of y.
    """

    usual: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": ("text", "sentence", "review", "content", "document", "sentence1", "premise"),
        "text_pair": ("text_pair", "sentence2", "hypothesis"),
        "label": ("label", "labels", "score", "value", "target", "rating", "stars", "similarity", "price"),
    }
    optional: ClassVar[frozenset[str]] = frozenset({"text_pair"})
    answer: ClassVar[str] = "label"
    reads: ClassVar[frozenset[str]] = TextTask.reads | {"augment"}
    augmented: ClassVar[tuple[str, ...]] = ("text", "text_pair")
    drops: ClassVar[frozenset[Reason]] = TextTask.drops | {"conflicting"}
    task_type: ClassVar[TaskType] = TaskType.SEQ_CLS
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[str] = "rmse"
    higher_is_better: ClassVar[bool] = False
    cross_entropy: ClassVar[bool] = False  # a squared error

    mean: float
    deviation: float

    @classmethod
    def cell(cls, name: str, value: Any, feature: Any) -> Any:
        """Numbers stay texts with all their digits, for 0 is not empty."""
        return repr(value) if isinstance(value, float) and value == value else columns.text(value, feature)

    @classmethod
    def unsuited(cls, found: Any, names: dict[str, str]) -> str:
        column = names[cls.answer]
        values = (cls.cell(cls.answer, value, found.features[column]) for value in found[column])
        strange = next((value for value in values if value and _number(value) is None), "")
        return f"{column} has {strange!r}, which is no number." if strange else ""

    @classmethod
    def fitted(cls, cells: dict[str, Cells], names: dict[str, str], data: Data, model: str) -> Self:
        for split, found in cells.items():
            for value in found[cls.answer]:
                if _number(value) is None:
                    raise DataError(f"{split}: the {cls.answer} {value!r} is no number.")
        known = numbers(cells["train"][cls.answer])
        mean = math.fsum(known) / len(known)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / len(known))
        if not deviation:
            raise DataError(f"{data.train}: the {cls.answer} of all rows is {known[0]:g}: there is nothing to learn.")
        tokenizer = cls.load_reader(model)
        return cls(names, tokenizer, cls.limit(data, model, tokenizer), mean, deviation)

    def texts(self, cells: Cells) -> tuple[Any, ...]:
        """What the tokenizer is given."""
        return cells["text"], cells.get("text_pair")

    def too_long(self, cells: Cells) -> set[int]:
        return self.longer(*self.texts(cells))

    def head(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        import datasets

        encoded = self.tokenized(*self.texts(cells))
        self.say_cut(encoded, split, say)
        labels = [(value - self.mean) / self.deviation for value in numbers(cells[self.answer])]
        return datasets.Dataset.from_dict({**encoded, "labels": labels})

    def show(self, row: dict[str, Any]) -> list[Piece]:
        return [(self.reader.decode(row["input_ids"]), False), (f"{self.units(row['labels']):g}", True)]

    def units(self, z: Any) -> Any:
        """y of z."""
        return z * self.deviation + self.mean

    def metrics(self, evaluation: Any, rows: Any) -> dict[str, float]:
        scores = evaluation.predictions[0] if isinstance(evaluation.predictions, tuple) else evaluation.predictions
        return errors(self.units(evaluation.label_ids), self.units(scores[:, 0]))

    def baseline(self, train: Any, rows: Any) -> dict[str, float]:
        """Of always guessing the mean."""
        return errors([self.units(z) for z in rows["labels"]], [self.mean] * len(rows))

    def predict(self, model: Any, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each text, or pair of them, a number."""
        import torch

        found: list[dict[str, Any]] = []
        for some in self.batches(inputs):
            rows = [given if isinstance(given, tuple) else (given,) for given in some]
            cells = {name: list(values) for name, values in zip(self.given(), zip(*rows, strict=True), strict=True)}
            batch = self.tokenized(*self.texts(cells), padding=True, return_tensors="pt").to(model.device)
            with torch.inference_mode():
                scores = model.eval()(**batch).logits[:, 0].float().tolist()
            found += [{self.answer: self.units(z)} for z in scores]
        return found


def _number(value: str) -> float | None:
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def numbers(values: Sequence[str]) -> list[float]:
    return [float(value) for value in values]


def errors(truth: Any, guess: Any) -> dict[str, float]:
    from sklearn.metrics import mean_absolute_error, root_mean_squared_error

    return {
        "rmse": float(root_mean_squared_error(truth, guess)),
        "mae": float(mean_absolute_error(truth, guess)),
    }
