"""Copies of training rows with other words, and the same labels (EDA, Wei and Zou 2019, arXiv 1901.11196).

Each copy of a text of L words is made by one of the operations, chosen at random, with its share a:

    random_deletion        each word is left out with probability a; of all words one stays
    random_swap            max(1, a L) times two words at random places change places
    synonym_replacement    max(1, a L) of the words that have synonyms become one of theirs

The paper found a = 0.05 or 0.1 good, 4 copies for thousands of rows and up to 16 for hundreds, and no gain on large
data. Its random insertion is left out. It takes synonyms from WordNet; here they come from a file, for no library
ships them. Words are what is between spaces: where a language writes none, nothing changes.

Anything else, such as a translation there and back, is an `Augmenter` given to `trimtab.training.train`.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from ..errors import ConfigError, DataError
from .cleaning import sample
from .columns import Cells, Say
from .paths import RecipePath

Augmenter = Callable[[list[str]], Sequence[str]]  # one more version of each text; one that is not changed is left out
Operation = Callable[[list[str], random.Random], list[str]]
Share = Annotated[float, Field(gt=0, lt=1, strict=True)]
Synonyms = dict[str, list[str]]


class Augment(BaseModel):
    """copies: of each row. synonyms: a JSON file, {"film": ["movie", "picture"]}; words are looked up in lower case."""

    model_config = ConfigDict(extra="forbid")

    copies: Annotated[StrictInt, Field(ge=1)] = 1
    random_deletion: Share | None = None
    random_swap: Share | None = None
    synonym_replacement: Share | None = None
    synonyms: RecipePath | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.synonyms is None) != (self.synonym_replacement is None):
            raise ValueError("synonym_replacement and synonyms, a file of them, need each other")
        if not (self.random_deletion or self.random_swap or self.synonym_replacement):
            raise ValueError("name an operation: random_deletion, random_swap, synonym_replacement")
        return self


def augmenters(settings: Augment, seed: int) -> list[Augmenter]:
    """One for each copy; what they draw is set by the seed. Raises: DataError, for a file that holds no synonyms."""
    operations: list[Operation] = []
    if settings.random_deletion:
        operations.append(partial(deleted, settings.random_deletion))
    if settings.random_swap:
        operations.append(partial(swapped, settings.random_swap))
    if settings.synonym_replacement and settings.synonyms:
        operations.append(partial(replaced, settings.synonym_replacement, _read(settings.synonyms)))
    drawn = random.Random(seed)
    return [partial(_changed, operations, drawn) for _ in range(settings.copies)]


def _changed(operations: list[Operation], drawn: random.Random, texts: list[str]) -> list[str]:
    return [" ".join(drawn.choice(operations)(text.split(), drawn)) for text in texts]


def deleted(share: float, words: list[str], drawn: random.Random) -> list[str]:
    return [word for word in words if drawn.random() >= share] or [drawn.choice(words)] if words else []


def swapped(share: float, words: list[str], drawn: random.Random) -> list[str]:
    found = list(words)
    for _ in range(max(1, int(share * len(words))) if len(words) > 1 else 0):
        i, j = drawn.sample(range(len(words)), 2)
        found[i], found[j] = found[j], found[i]
    return found


def replaced(share: float, synonyms: Synonyms, words: list[str], drawn: random.Random) -> list[str]:
    found = list(words)
    places = [i for i, word in enumerate(words) if word.lower() in synonyms]
    for i in drawn.sample(places, min(len(places), max(1, int(share * len(words))))):
        found[i] = drawn.choice(synonyms[words[i].lower()])
    return found


def augmented(cells: Cells, columns: Iterable[str], augmenters: Sequence[Augmenter], say: Say) -> Cells:
    """The rows, and behind them their changed copies.

    Args:
        columns: those with the texts. All other cells of a copy are its row's.
    Raises:
        ConfigError: an augmenter that does not give a text for each. DataError: no copy is changed.
    """
    size = len(next(iter(cells.values())))
    found = {name: list(values) for name, values in cells.items()}
    for augmenter in augmenters:
        changed = {name: list(augmenter(list(cells[name]))) for name in columns if name in cells}
        if wrong := [texts for texts in changed.values() if len(texts) != size]:
            raise ConfigError(f"An augmenter gives a text for each; of {size} this one gave {len(wrong[0])}.")
        for i in range(size):
            row = {name: texts[i] for name, texts in changed.items()}
            if any(text != cells[name][i] for name, text in row.items()) and all(
                bool(text.strip()) == bool(cells[name][i]) for name, text in row.items()
            ):
                for name, values in found.items():
                    values.append(row.get(name, cells[name][i]))
    copies = len(next(iter(found.values()))) - size
    if not copies:
        raise DataError("data.augment: no copy of a training row is changed. Raise the shares, or leave it out.")
    left_out = size * len(augmenters) - copies
    say(f"train: {copies} changed copies added to {size} rows, such as {sample(found, size)}"
        + (f"; {left_out} without a change left out" if left_out else ""))  # fmt: skip
    return found


def _read(path: Path) -> Synonyms:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        synonyms = {str(word).lower(): [str(other) for other in others] for word, others in found.items()}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, AttributeError, TypeError):
        synonyms = {}
    if not synonyms or not all(synonyms.values()) or any(isinstance(others, str) for others in found.values()):
        raise DataError(f'{path} holds no synonyms. It should look like {{"film": ["movie", "picture"]}}.')
    return synonyms
