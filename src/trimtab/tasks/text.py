"""What tasks over text share: a tokenizer, a limit of length, padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from . import columns, models, rows
from .columns import Say
from .task import Data, Task

LONGEST = 512  # tokens, where neither the recipe nor the model says less
WORDS = "the quick brown fox does not jump over 13 lazy dogs , or so they say .".split()


@dataclass(frozen=True)
class TextTask(Task):
    """max_length: tokens; longer rows are cut."""

    max_length: int

    @staticmethod
    def limit(data: Data, model: str, tokenizer: Any) -> int:
        """data.max_length, or what the model can read. Raises: ConfigError, where it cannot read as much."""
        most = models.longest(model, tokenizer)
        if data.max_length and data.max_length > most:
            raise ConfigError(f"data.max_length={data.max_length} is more than the {most} tokens {model} can read.")
        return data.max_length or min(most, LONGEST)

    def tokenized(self, *texts: Any, **settings: Any) -> Any:
        return self.reader(*texts, truncation=True, max_length=self.max_length, **settings)

    def say_cut(self, encoded: Any, split: str, say: Say, only: str = "") -> None:
        if cut := sum(bool(encoding.overflowing) for encoding in encoded.encodings or ()):
            say(f"{split}: {cut} of {len(encoded['input_ids'])} texts cut to {self.max_length} tokens")

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(self.reader.pad(rows, return_tensors="pt"))

    def batches(self, inputs: Sequence[Any], size: int = 32) -> Iterator[Sequence[Any]]:
        return (inputs[start : start + size] for start in range(0, len(inputs), size))

    def inputs(self, path: Path) -> list[Any]:
        """The texts (or tuples of them) of a file: one a line in a .txt, else from the columns trained on."""
        answer = list(self.usual)[-1]
        wanted = [column for name, column in self.names.items() if name != answer]
        if path.suffix == ".txt":
            found: list[Any] = rows.lines(path)
        else:
            table = rows.read(path)
            columns.check(path, table, wanted)
            cells = [[columns.text(value) for value in table[column]] for column in wanted]
            found = cells[0] if len(cells) == 1 else list(zip(*cells, strict=True))
        if not found:
            raise DataError(f"{path} holds no text.")
        return found
