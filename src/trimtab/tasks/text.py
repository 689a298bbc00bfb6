"""What tasks over text share: a tokenizer, a limit of length, padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .. import watch
from ..errors import ConfigError, DataError
from . import columns, models, rows
from .cleaning import Reason
from .columns import Say
from .task import Data, Task

PART = 1000  # texts that are tokenized at a time
LONGEST = 512  # tokens, where neither the recipe nor the model says less
WORDS = "the quick brown fox does not jump over 13 lazy dogs , or so they say .".split()


@dataclass(frozen=True)
class TextTask(Task):
    """max_length: tokens; longer rows are cut."""

    reads: ClassVar[frozenset[str]] = frozenset({"max_length", "drop"})
    drops: ClassVar[frozenset[Reason]] = frozenset({"duplicate", "leaked", "too_long"})

    max_length: int

    @staticmethod
    def limit(data: Data, model: str, tokenizer: Any) -> int:
        """data.max_length, or what the model can read. Raises: ConfigError, where that is less, or leaves nothing."""
        most = models.longest(model, tokenizer)
        if data.max_length and data.max_length > most:
            raise ConfigError(f"data.max_length={data.max_length} is more than the {most} tokens {model} can read.")
        if data.max_length and data.max_length <= (special := tokenizer.num_special_tokens_to_add()):
            raise ConfigError(
                f"data.max_length={data.max_length} leaves no room for words beside the {special} special tokens."
            )
        return data.max_length or min(most, LONGEST)

    def tokenized(self, *texts: Any, **settings: Any) -> Any:
        """What the tokenizer makes of lists; of long ones it is shown how far it is."""
        settings = {"truncation": True, "max_length": self.max_length, **settings}
        given = [column for column in (*texts, settings.get("text_target")) if column is not None]
        if len(given[0]) <= PART:
            return self.reader(*texts, **settings)
        from transformers import BatchEncoding

        found = []
        for start in watch.through("Tokenizing", range(0, len(given[0]), PART)):

            def part(value: Any, start: int = start) -> Any:
                return value[start : start + PART] if isinstance(value, list) else value

            found.append(self.reader(*map(part, texts), **{name: part(value) for name, value in settings.items()}))
        data = {name: [row for one in found for row in one[name]] for name in found[0]}
        return BatchEncoding(data, [encoding for one in found for encoding in one.encodings or ()] or None)

    def say_cut(self, encoded: Any, split: str, say: Say, what: str = "texts") -> None:
        if cut := sum(bool(encoding.overflowing) for encoding in encoded.encodings or ()):
            say(f"{split}: {cut} of {len(encoded['input_ids'])} {what} cut to {self.max_length} tokens")

    def longer(self, *texts: Any, **settings: Any) -> set[int]:
        """The rows that `tokenized` would cut."""
        found = self.reader(*texts, **settings)
        return {i for i, ids in enumerate(found["input_ids"]) if len(ids) > self.max_length}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(self.reader.pad(rows, return_tensors="pt"))

    def example(self) -> dict[str, Any]:
        texts = [" ".join(WORDS[:n]) for n in range(1, len(WORDS) + 1)]
        pairs = texts[::-1] if "text_pair" in self.names else None
        return dict(self.reader.pad(self.tokenized(texts, pairs), return_tensors="pt"))

    def batches(self, inputs: Sequence[Any], size: int = 32) -> Iterator[Sequence[Any]]:
        return (inputs[start : start + size] for start in range(0, len(inputs), size))

    def given(self) -> dict[str, str]:
        """The columns that are there before the answer is."""
        return {name: column for name, column in self.names.items() if name != self.answer}

    def asked(self, texts: Sequence[str]) -> list[Any]:
        """Texts, or tuples of them where a row has several."""
        size = len(self.given())
        if len(texts) % size:
            raise DataError(f"This task reads {size} texts at a time ({', '.join(self.given())}), not {len(texts)}.")
        return list(texts) if size == 1 else list(zip(*[iter(texts)] * size, strict=True))

    def inputs(self, path: Path) -> list[Any]:
        """What `asked` gives for the texts of a file: one a line in a .txt, else from the columns trained on."""
        if path.suffix == ".txt":
            found = self.asked(rows.lines(path))
        else:
            table, wanted = rows.read(path), self.given()
            columns.check(path, table, wanted.values())
            cells = [[self.cell(name, value, None) for value in table[column]] for name, column in wanted.items()]
            found = cells[0] if len(cells) == 1 else list(zip(*cells, strict=True))
        if not found:
            raise DataError(f"{path} holds no text.")
        return found
