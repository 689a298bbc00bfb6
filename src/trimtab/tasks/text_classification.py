"""Text classification: one text, or a pair of them, to one of several classes."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from ..adapter import TaskType
from ..errors import CheckpointError, ConfigError, DataError
from . import models
from . import rows as files
from .task import Data, Quantization, Say, Task

SAVED = "task.json"
LONGEST = 512  # tokens, where neither the recipe nor the model says less

# Names under which the columns usually go, the most telling first.
NAMES = {
    "text": ("text", "sentence", "review", "content", "document", "sentence1", "premise", "question1", "question"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2"),
    "label": ("label", "labels", "class", "category", "sentiment", "polarity", "target", "intent", "topic"),
}


@dataclass(frozen=True)
class TextClassification(Task):
    """`labels` are the class names in the order of the model's outputs; `names` is data.columns, completed."""

    columns: ClassVar[tuple[str, ...]] = ("text", "text_pair", "label")
    task_type: ClassVar[TaskType] = TaskType.SEQ_CLS
    metric: ClassVar[str] = "accuracy"

    labels: tuple[str, ...]
    names: dict[str, str]
    tokenizer: Any
    max_length: int

    @classmethod
    def from_data(cls, data: Data, model: str, seed: int, say: Say) -> tuple[Self, dict[str, Any]]:
        given = {"train": data.train, "validation": data.validation, "test": data.test}
        raw = {split: files.read(path) for split, path in given.items() if isinstance(path, Path)}
        columns = data.columns | _guess(raw["train"], data)
        guessed = [f"{column} is the {name}" for name, column in columns.items() if name not in data.columns]
        if guessed:
            say(f"Columns guessed: {', '.join(guessed)} (data.columns changes this)")
        texts = {split: _clean(given[split], found, columns, split, say) for split, found in raw.items()}
        if isinstance(data.validation, float):
            texts["train"], texts["validation"] = _split(texts["train"], data.validation, seed)
        labels = _labels(texts, data)
        tokenizer = models.tokenizer(model)
        limit = models.longest(model, tokenizer)
        if data.max_length and data.max_length > limit:
            raise ConfigError(f"data.max_length={data.max_length} is more than the {limit} tokens {model} can read.")
        task = cls(labels, columns, tokenizer, data.max_length or min(limit, LONGEST))
        return task, {split: task._encode(found, split, say) for split, found in texts.items()}

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        if not (folder / SAVED).is_file():
            raise CheckpointError(f"{folder} was not written by `trimtab train`: there is no {SAVED} in it.")
        known = json.loads((folder / SAVED).read_text(encoding="utf-8"))
        return cls(tuple(known["labels"]), known["columns"], models.tokenizer(str(folder)), known["max_length"])

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        known = {"labels": self.labels, "columns": self.names, "max_length": self.max_length}
        (folder / SAVED).write_text(json.dumps(known, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def load_model(self, model: str, quantization: Quantization) -> tuple[Any, list[str]]:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        with models.loading(model):
            config = AutoConfig.from_pretrained(
                model,
                num_labels=len(self.labels),
                id2label=dict(enumerate(self.labels)),
                label2id={label: i for i, label in enumerate(self.labels)},
            )
        if config.get_text_config().pad_token_id is None:  # decoders find the last token of a row by it
            config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return models.load(AutoModelForSequenceClassification, model, config, quantization)

    def _encode(self, found: dict[str, list[Any]], split: str, say: Say) -> Any:
        import datasets

        encoded = self.tokenizer(found["text"], found.get("text_pair"), truncation=True, max_length=self.max_length)
        if cut := sum(bool(encoding.overflowing) for encoding in encoded.encodings or ()):
            say(f"{split}: {cut} of {len(found['text'])} texts cut to {self.max_length} tokens")
        labels = [self.labels.index(label) for label in found["label"]]
        return datasets.Dataset.from_dict({**encoded, "labels": labels})

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(self.tokenizer.pad(rows, return_tensors="pt"))

    def metrics(self, evaluation: Any) -> dict[str, float]:
        scores = evaluation.predictions[0] if isinstance(evaluation.predictions, tuple) else evaluation.predictions
        return _scores(evaluation.label_ids, scores.argmax(-1))

    def baseline(self, train: Any, rows: Any) -> dict[str, float]:
        [(commonest, _)] = Counter(train["labels"]).most_common(1)
        return _scores(rows["labels"], [commonest] * len(rows))

    def example(self) -> dict[str, Any]:
        words = "the quick brown fox does not jump over 13 lazy dogs , or so they say .".split()
        texts = [" ".join(words[:n]) for n in range(1, len(words) + 1)]
        pairs = texts[::-1] if "text_pair" in self.names else None
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.max_length)
        return dict(self.tokenizer.pad(encoded, return_tensors="pt"))

    def inputs(self, path: Path) -> list[Any]:
        """The texts (or pairs) of a file: one a line in a .txt, else from the columns trained on."""
        found: list[Any]
        if path.suffix == ".txt":
            found = files.lines(path)
        else:
            rows = files.read(path)
            wanted = [column for name, column in self.names.items() if name != "label"]
            _check_columns(path, rows, wanted)
            cells = [[_cell(value) for value in rows[column]] for column in wanted]
            found = cells[0] if len(cells) == 1 else list(zip(*cells, strict=True))
        if not found:
            raise DataError(f"{path} holds no text.")
        return found

    def predict(self, model: Any, inputs: Sequence[Any]) -> list[dict[str, float]]:
        """For each text, or pair of them, the probability of each class."""
        import torch

        found: list[dict[str, float]] = []
        with torch.inference_mode():
            for start in range(0, len(inputs), 32):
                batch = self.tokenizer(
                    list(inputs[start : start + 32]),
                    truncation=True,
                    max_length=self.max_length,
                    padding=True,
                    return_tensors="pt",
                )
                for row in model.eval()(**batch.to(model.device)).logits.float().softmax(-1).tolist():
                    found.append(dict(zip(self.labels, row, strict=True)))
        return found


def _scores(truth: Any, guess: Any) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score

    macro = f1_score(truth, guess, average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(truth, guess)), "f1_macro": float(macro)}


def _guess(found: Any, data: Data) -> dict[str, str]:
    """The columns that the recipe does not name, by their usual names.

    Raises:
        DataError: a named column that is not there, or no column of a usual name.
    """
    there = ", ".join(found.column_names)
    for name, column in data.columns.items():
        if column not in found.column_names:
            raise DataError(f"{data.train} has no column {column!r} (data.columns.{name}). It has: {there}.")
    lowered = {column.lower(): column for column in found.column_names if column not in data.columns.values()}
    guessed: dict[str, str] = {}
    for name, usual in NAMES.items():
        hit = next((lowered[word] for word in usual if word in lowered), None)
        if name in data.columns:
            continue
        if hit is not None:
            guessed[name] = hit
        elif name != "text_pair":
            hint = "data: {columns: {text: ..., label: ...}}"
            raise DataError(f"{data.train}: which column is the {name}? It has: {there}. Say so in the recipe, {hint}")
    return guessed


def _clean(path: Any, found: Any, columns: dict[str, str], split: str, say: Say) -> dict[str, list[str]]:
    """The rows that have a text and a label, by the task's column names."""
    _check_columns(path, found, columns.values())
    cells = {name: [_cell(value) for value in found[column]] for name, column in columns.items()}
    feature = found.features[columns["label"]]
    if hasattr(feature, "int2str"):  # parquet files can hold class numbers with their names
        cells["label"] = [feature.int2str(int(number)) if number else "" for number in cells["label"]]
    kept = [i for i, row in enumerate(zip(*cells.values(), strict=True)) if all(row)]
    dropped = len(found) - len(kept)
    say(f"{split}: {len(found)} rows read, {len(kept)} kept" + (f", {dropped} empty dropped" if dropped else ""))
    if not kept:
        raise DataError(f"{path}: no row has both a text and a label.")
    return {name: [values[i] for i in kept] for name, values in cells.items()}


def _check_columns(path: Path, found: Any, wanted: Iterable[str]) -> None:
    for column in wanted:
        if column not in found.column_names:
            raise DataError(f"{path} has no column {column!r}. It has: {', '.join(found.column_names)}.")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:g}"  # a column of numbers with a gap is read as floats
    return "" if value is None else str(value).strip()


def _split(found: dict[str, list[str]], fraction: float, seed: int) -> tuple[dict[str, list[str]], ...]:
    """Two parts with the same share of each class; without, where a class is too rare for that."""
    from sklearn.model_selection import train_test_split

    everything = range(len(found["label"]))
    try:
        try:
            parts = train_test_split(everything, test_size=fraction, random_state=seed, stratify=found["label"])
        except ValueError:
            parts = train_test_split(everything, test_size=fraction, random_state=seed)
    except ValueError:
        raise DataError(f"{len(everything)} rows are too few to set {fraction:g} aside for validation.") from None
    return tuple({name: [values[i] for i in part] for name, values in found.items()} for part in parts)


def _labels(texts: dict[str, dict[str, list[str]]], data: Data) -> tuple[str, ...]:
    """The classes of the training rows: numbers by size, words by the alphabet."""
    known = set(texts["train"]["label"])
    if len(known) < 2:
        raise DataError(f"{data.train} has one class only, {known.pop()!r}: there is nothing to tell apart.")
    if len(known) > 20 and len(known) > len(texts["train"]["label"]) / 2:
        raise DataError(f"{data.train} has {len(known)} labels in {len(texts['train']['label'])} rows: no classes.")
    for split, found in texts.items():
        if strange := sorted(set(found["label"]) - known):
            raise DataError(f"The {split} rows have the label {strange[0]!r}, which no training row has.")
    return tuple(sorted(known, key=lambda label: (0, int(label), "") if _is_whole(label) else (1, 0, label)))


def _is_whole(label: str) -> bool:
    return label.removeprefix("-").isdecimal()
