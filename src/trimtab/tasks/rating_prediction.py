"""Rating prediction: how a user rates an item, from both of their names and, where there is one, a text of the item."""

from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Self

from .columns import Cells, Say
from .identifiers import IdentifierTask
from .task import Data
from .text_regression import TextRegression, errors


@dataclass(frozen=True)
class RatingPrediction(IdentifierTask, TextRegression):
    """The model reads "<user:...> <item:...> text"."""

    usual: ClassVar[dict[str, tuple[str, ...]]] = {
        "user": ("user", "user_id", "userid", "reviewerid", "customer_id"),
        "item": ("item", "item_id", "itemid", "movieid", "movie_id", "asin", "parent_asin", "product_id", "book_id"),
        "text": ("text", "title", "item_title", "description", "name"),
        "rating": ("rating", "stars", "score", "overall", "label"),
    }
    optional: ClassVar[frozenset[str]] = frozenset({"text"})
    answer: ClassVar[str] = "rating"
    reads: ClassVar[frozenset[str]] = IdentifierTask.reads
    augmented: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def fitted(cls, cells: dict[str, Cells], names: dict[str, str], data: Data, model: str) -> Self:
        task = super().fitted(cells, names, data, model)
        for kind in ("user", "item"):
            cls.add(task.reader, kind, cells["train"][kind])
        return task

    def texts(self, cells: Cells) -> tuple[Any, ...]:
        rows = zip(cells["user"], cells["item"], cells.get("text", [""] * len(cells["user"])), strict=True)
        return ([" ".join((self.token("user", user), self.token("item", item), text)) for user, item, text in rows],)

    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        for kind in ("user", "item"):
            strange = sum(not self.knows(kind, name) for name in cells[kind])
            if strange:
                say(f"{split}: {strange} of {len(cells[kind])} rows are of a new {kind}, which no training row has")
        return super().encode(cells, split, say).add_column("item", cells["item"])

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return super().collate([{name: value for name, value in row.items() if name != "item"} for row in rows])

    def baseline(self, train: Any, rows: Any) -> dict[str, float]:
        """Of always guessing the item's mean rating; of an item that is new, the mean of all."""
        known = defaultdict(list)
        for item, z in zip(train["item"], train["labels"], strict=True):
            known[item].append(self.units(z))
        means = {item: fmean(ratings) for item, ratings in known.items()}
        return errors([self.units(z) for z in rows["labels"]], [means.get(item, self.mean) for item in rows["item"]])

    def example(self) -> dict[str, Any]:
        known = self.reader.convert_ids_to_tokens(self.tokens())
        texts = [" ".join(pair) for pair in zip(known, known[::-1], strict=True)]
        return dict(self.reader.pad(self.tokenized(texts), return_tensors="pt"))
