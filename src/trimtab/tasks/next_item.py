"""Next item: which item of a catalogue follows a sequence of them. Scores over the whole catalogue:

    HR@10 = mean [rank <= 10],    NDCG@10 = mean [rank <= 10] / log2(rank + 1)

with the rank of the item that did follow, from 1; among equals it comes last. Items that are in the sequence are
ranked, too, for people come back. Of a training sequence each item after the first is learned from those before it; of
one that is held out only the last is scored (leave one out, as in SASRec, Kang and McAuley 2018, arXiv 1808.09781).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..adapter import TaskType
from ..errors import DataError
from . import columns, models
from .classification import classifier
from .cleaning import Reason
from .columns import Cells, Say
from .identifiers import IdentifierTask
from .task import Data, Piece

TOP = 10


@dataclass(frozen=True)
class NextItem(IdentifierTask):
    """The model reads the sequence, "<item:...> title <item:...> title", and has a class for each item.

    Long sequences lose their start. items: the catalogue, in the order of the model's outputs. titles: those that are
    known.
    """

    usual: ClassVar[dict[str, tuple[str, ...]]] = {
        "items": ("items", "item_ids", "sequence", "history", "session", "asins"),
        "titles": ("titles", "texts", "names"),
    }
    optional: ClassVar[frozenset[str]] = frozenset({"titles"})
    answer: ClassVar[str] = ""  # a sequence is its own
    drops: ClassVar[frozenset[Reason]] = frozenset({"duplicate", "leaked"})
    task_type: ClassVar[TaskType] = TaskType.SEQ_CLS
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[str] = "ndcg@10"

    items: list[str]
    titles: dict[str, str]

    @classmethod
    def load_reader(cls, model: str) -> Any:
        tokenizer = models.tokenizer(model)
        tokenizer.truncation_side = "left"
        return tokenizer

    @classmethod
    def cell(cls, name: str, value: Any, feature: Any) -> Any:
        """A list; of items also a text with spaces between them."""
        values = value.split() if isinstance(value, str) and name == "items" else value or []
        if isinstance(values, str):
            raise DataError(f"Titles are a list as long as that of their items, not {values[:80]!r}.")
        return [columns.text(part) for part in values]

    @classmethod
    def split(cls, cells: Cells, fraction: float, seed: int) -> tuple[Cells, Cells]:
        """Of a fraction of the sequences the last item is set aside; 1.0 means of all. Two stay in any case."""
        import random

        sequences = cells["items"]
        long = [i for i, sequence in enumerate(sequences) if len(sequence) > 2]
        held = set(random.Random(seed).sample(long, round(fraction * len(long))))
        if not held:
            raise DataError(f"{len(long)} sequences of three items and more are too few to set {fraction:g} aside.")
        train = {
            name: [value[: len(sequences[i]) - (i in held)] for i, value in enumerate(of)] for name, of in cells.items()
        }
        return train, {name: [values[i] for i in sorted(held)] for name, values in cells.items()}

    @classmethod
    def fitted(cls, cells: dict[str, Cells], names: dict[str, str], data: Data, model: str) -> Self:
        titles: dict[str, str] = {}
        for split, found in cells.items():
            for sequence, named in zip(found["items"], found.get("titles", ()), strict=False):
                if len(sequence) != len(named):
                    raise DataError(f"{split}: {len(sequence)} items have {len(named)} titles in the row {sequence}.")
                titles.update(zip(sequence, named, strict=True))
        items = {item for found in cells.values() for sequence in found["items"] for item in sequence}
        tokenizer = cls.load_reader(model)
        cls.add(tokenizer, "item", (item for sequence in cells["train"]["items"] for item in sequence))
        return cls(names, tokenizer, cls.limit(data, model, tokenizer), sorted(items), titles)

    def head(self) -> dict[str, Any]:
        return classifier(self.items)

    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        import datasets

        found = [
            (row, sequence[:end], sequence[end])
            for row, sequence in enumerate(cells["items"])
            for end in range(1 if split == "train" else max(1, len(sequence) - 1), len(sequence))
        ]
        if single := sum(len(sequence) < 2 for sequence in cells["items"]):
            say(f"{split}: {single} sequences of one item dropped, after which nothing follows")
        if not found:
            raise DataError(f"{split}: no sequence has two items.")
        if strange := sum(not self.knows("item", item) for *_, item in found):
            say(f"{split}: {strange} of {len(found)} items to be found are in no training row")
        encoded = self.tokenized([self._written(history) for _, history, _ in found])
        self.say_cut(encoded, split, say, "sequences")
        number = {item: i for i, item in enumerate(self.items)}
        labels = [number[item] for *_, item in found]
        return datasets.Dataset.from_dict({**encoded, "labels": labels, "row": [row for row, *_ in found]})

    def _written(self, history: Sequence[str]) -> str:
        recent = history[-self.max_length :]
        return " ".join(f"{self.token('item', item)} {self.titles.get(item, '')}".strip() for item in recent)

    def show(self, row: dict[str, Any]) -> list[Piece]:
        item = self.items[row["labels"]]
        return [(self.reader.decode(row["input_ids"]), False), (f"{item} {self.titles.get(item, '')}".strip(), True)]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return super().collate([{name: value for name, value in row.items() if name != "row"} for row in rows])

    def count(self, rows: Any) -> int:
        return len(set(rows["row"]))

    def reduced(self, logits: Any, labels: Any) -> Any:
        """The rank of the item that did follow: (B,)."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        return (logits >= logits.gather(1, labels[:, None])).sum(1)

    def metrics(self, evaluation: Any, rows: Any) -> dict[str, float]:
        return ranking(evaluation.predictions)

    def baseline(self, train: Any, rows: Any) -> dict[str, float]:
        """Of always ranking items by how often they come in the training rows."""
        import numpy as np

        often = Counter(train["labels"])
        counts = np.array([often[i] for i in range(len(self.items))])
        return ranking((counts >= counts[rows["labels"]][:, None]).sum(1))

    def example(self) -> dict[str, Any]:
        known = [item for item in self.items if self.knows("item", item)]
        histories = [known[start : start + 4] for start in range(0, len(known), 4)]
        return dict(self.reader.pad(self.tokenized(list(map(self._written, histories))), return_tensors="pt"))

    def given(self) -> dict[str, str]:
        return {"items": self.names["items"]}

    def predict(self, model: Any, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each sequence (items, or a text with spaces between them) the ten likeliest items that follow."""
        import torch

        found: list[dict[str, Any]] = []
        for some in self.batches(inputs):
            texts = [self._written(self.cell("items", given, None)) for given in some]
            batch = self.tokenized(texts, padding=True, return_tensors="pt").to(model.device)
            with torch.inference_mode():
                best = model.eval()(**batch).logits.float().softmax(-1).topk(min(TOP, len(self.items)))
            for values, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                top = [{"item": self.items[i], "probability": value} for i, value in zip(places, values, strict=True)]
                found.append({"item": top[0]["item"], "top": top})
        return found


def ranking(ranks: Any) -> dict[str, float]:
    import numpy as np

    ranks = np.asarray(ranks)
    near = ranks <= TOP
    return {"ndcg@10": float((near / np.log2(ranks + 1)).mean()), "hr@10": float(near.mean())}
