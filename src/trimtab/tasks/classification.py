"""What tasks with one of several classes for each row share, whatever is read."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import DataError
from .task import Data, Task


@dataclass(frozen=True)
class Classification(Task):
    """`labels` are the class names in the order of the model's outputs."""

    answer: ClassVar[str] = "label"
    metric: ClassVar[str] = "accuracy"

    labels: list[str]

    @classmethod
    def unsuited(cls, found: Any, names: dict[str, str]) -> str:
        return no_classes(names["label"], found[names["label"]])

    def head(self) -> dict[str, Any]:
        return classifier(self.labels)

    def metrics(self, evaluation: Any, rows: Any) -> dict[str, float]:
        scores = evaluation.predictions[0] if isinstance(evaluation.predictions, tuple) else evaluation.predictions
        return accuracy(evaluation.label_ids, scores.argmax(-1))

    def baseline(self, train: Any, rows: Any) -> dict[str, float]:
        return commonest(train, rows)


def classes(labels: list[str], data: Data) -> list[str]:
    """The classes of the training rows: numbers by size, words by the alphabet. Raises: DataError."""
    known = set(labels)
    if len(known) < 2:
        raise DataError(f"{data.train} has one class only, {known.pop()!r}: there is nothing to tell apart.")
    if reason := no_classes(data.train, labels):
        raise DataError(reason)
    return sorted(known, key=lambda label: (0, int(label), "") if _is_whole(label) else (1, 0, label))


def numbers(labels: Iterable[str], classes: list[str], split: str) -> list[int]:
    """The classes' numbers. Raises: DataError, where a label is none of them."""
    known = {label: i for i, label in enumerate(classes)}
    try:
        return [known[label] for label in labels]
    except KeyError as error:
        raise DataError(f"{split}: the label {error} is none that was trained on: {', '.join(classes[:12])}.") from None


def no_classes(where: Any, labels: Sequence[Any]) -> str:
    """Why these are no classes: most are there only once. Else ''."""
    known = len({str(label) for label in labels})
    many = known > 20 and known > len(labels) / 2
    return f"{where} has {known} labels in {len(labels)} rows: no classes." if many else ""


def _is_whole(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def classifier(labels: list[str]) -> dict[str, Any]:
    """What the config of a model is told of its classes."""
    ids = {label: i for i, label in enumerate(labels)}
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": ids}


def accuracy(truth: Any, guess: Any) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score

    macro = f1_score(truth, guess, average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(truth, guess)), "f1_macro": float(macro)}


def commonest(train: Any, rows: Any) -> dict[str, float]:
    """The scores of always guessing the class that most training rows have."""
    [(label, _)] = Counter(train["labels"]).most_common(1)
    return accuracy(rows["labels"], [label] * len(rows))


def likely(labels: list[str], model: Any, batch: Any) -> list[dict[str, Any]]:
    """For each row of a batch the likeliest class, and the probability of each."""
    import torch

    with torch.inference_mode():
        scores = model.eval()(**{name: value.to(model.device) for name, value in batch.items()}).logits
    rows = scores.float().softmax(-1).tolist()
    named = [dict(zip(labels, row, strict=True)) for row in rows]
    return [{"label": max(row, key=row.__getitem__), "probabilities": row} for row in named]
