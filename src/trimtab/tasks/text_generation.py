"""Text generation with a causal model: plain text, or instructions and chats of which only the answers are learned."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from .. import watch
from ..adapter import TaskType
from ..errors import ConfigError, DataError
from . import columns, packing, rows
from .columns import Cells, Say
from .paths import Source
from .task import Data, Piece
from .text import WORDS, TextTask
from .token_classification import IGNORED, padded

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # under other names elsewhere
NEW_TOKENS = 128  # the longest answer that `predict` writes

Message = dict[str, str]  # role, content


@dataclass(frozen=True)
class TextGeneration(TextTask):
    """A row is a text; a prompt (with an input, where there is one) and its answer; or a list of messages.

    Prompts and messages are written in the tokenizer's chat template, or where it has none as lines. Of them only the
    answers are learned, with the token that ends each. Texts are learned whole, and long ones in blocks. packing: rows
    to train on share blocks (packing.py).
    """

    usual: ClassVar[dict[str, tuple[str, ...]]] = {
        "messages": ("messages", "conversations", "conversation", "chat"),
        "prompt": ("prompt", "instruction", "question", "query"),
        "input": ("input", "context"),
        "answer": ("answer", "output", "response", "completion", "target"),
        "text": ("text", "content", "quote", "document", "sentence"),
    }
    optional: ClassVar[frozenset[str]] = frozenset(usual)
    answer: ClassVar[str] = "answer"
    task_type: ClassVar[TaskType] = TaskType.CAUSAL_LM
    auto: ClassVar[str] = "AutoModelForCausalLM"
    metric: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    divides_loss: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = TextTask.reads | {"packing"}

    packing: bool = False

    @classmethod
    def read(cls, source: Source, split: str, say: Say) -> Any:
        if isinstance(source, Path) and source.name.removesuffix(".gz").endswith(".txt"):
            return rows.document(source)
        return rows.read(source)

    @classmethod
    def chosen(cls, names: dict[str, str], data: Data) -> dict[str, str]:
        for needed in (("messages",), ("prompt", "answer"), ("text",)):
            if all(name in names for name in needed):
                kept = {*needed, "input"} if "prompt" in needed else {*needed}
                return {name: column for name, column in names.items() if name in kept}
        raise DataError(
            f"{data.train}: which columns hold the text? Say so in the recipe: data: {{columns: {{text: ...}}}}, or "
            "{prompt: ..., answer: ...}, or {messages: ...}."
        )

    @classmethod
    def needed(cls, names: dict[str, str]) -> list[str]:
        return [name for name in names if name != "input"]

    @classmethod
    def cell(cls, name: str, value: Any, feature: Any) -> Any:
        if name != "messages":
            return columns.text(value, feature)
        try:
            return [_message(part) for part in value or ()]
        except (AttributeError, KeyError, TypeError):
            raise DataError(
                f"A row of messages is a list of {{role, content}} (or {{from, value}}), not {str(value)[:80]!r}."
            ) from None

    @classmethod
    def split(cls, cells: Cells, fraction: float, seed: int) -> tuple[Cells, Cells]:
        """Of a single text the last lines are set aside."""
        if "text" not in cells or len(cells["text"]) > 1:
            return super().split(cells, fraction, seed)
        lines = cells["text"][0].splitlines(keepends=True)
        start = round(len(lines) * (1 - fraction))
        if not 0 < start < len(lines):
            raise DataError(f"{len(lines)} lines are too few to set {fraction:g} aside for validation.")
        return {"text": ["".join(lines[:start])]}, {"text": ["".join(lines[start:])]}

    @classmethod
    def fitted(cls, cells: dict[str, Cells], names: dict[str, str], data: Data, model: str) -> Self:
        tokenizer = cls.load_reader(model)
        if tokenizer.eos_token is None:
            raise ConfigError(f"The tokenizer of {model} has no token that ends a text, so answers would never end.")
        return cls(names, tokenizer, cls.limit(data, model, tokenizer), bool(data.packing))

    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        import datasets

        found: list[dict[str, Any]] = []
        cut = lost = 0
        for row in watch.through(f"Tokenizing {split}", _rows(cells)):
            if "text" in row:
                found += self._blocks(row["text"])
                continue
            messages = _messages(row)
            ids, labels, whole = self._chat(messages)
            if ids:
                found.append(_row(ids, labels))
                cut += not whole
            else:
                lost += 1
        if cut:
            say(f"{split}: {cut} chats cut after the last answer that ends within {self.max_length} tokens")
        if lost:
            say(f"{split}: {lost} rows dropped, of which no answer ends within {self.max_length} tokens")
        if not found:
            raise DataError(
                f"{split}: of no row an answer ends within {self.max_length} tokens, so nothing can be learned. Raise "
                f"data.max_length. The last row starts: {self._start(messages)!r}"
            )
        if self.packing and split == "train":
            blocks = packing.packed(found, self.max_length)
            say(f"{split}: {len(found)} rows packed into {len(blocks)} blocks of up to {self.max_length} tokens")
            found = blocks
        return datasets.Dataset.from_list(found)

    def count(self, rows: Any) -> int:
        if "position_ids" not in rows.column_names:
            return super().count(rows)
        return sum(block.count(0) for block in rows["position_ids"])

    def too_long(self, cells: Cells) -> set[int]:
        if "text" in cells:
            raise ConfigError("data.drop: too_long is of no use to plain texts, which are learned in blocks.")
        return {i for i, row in enumerate(_rows(cells)) if not self._chat(_messages(row))[2]}

    def _blocks(self, text: str) -> list[dict[str, Any]]:
        ids = self.reader(text).input_ids
        if ids[-1:] != [self.reader.eos_token_id]:
            ids = [*ids, self.reader.eos_token_id]
        parts = [ids[start : start + self.max_length] for start in range(0, len(ids), self.max_length)]
        return [_row(part, part) for part in parts if len(part) > 1]

    def _chat(self, messages: Sequence[Message]) -> tuple[list[int], list[int], bool]:
        """Token ids up to the last answer that ends within the limit, labels that are ignored outside the answers,
        and whether that is all."""
        ids: list[int] = []
        labels: list[int] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._written(messages[:i], answers=True)
            upto = self._written(messages[: i + 1])
            if upto[: len(before)] != before or before[: len(ids)] != ids:
                raise ConfigError(
                    "The chat template writes a message differently when others follow, so that its answers cannot be "
                    "told from the rest. Give the rows as prompt and answer, or as text."
                )
            if len(upto) > self.max_length:
                return ids, labels, False
            ids, labels = upto, labels + [IGNORED] * (len(before) - len(labels)) + upto[len(before) :]
        return ids, labels, True

    def _start(self, messages: Sequence[Message]) -> str:
        return str(self.reader.decode(self._written(messages)[: self.max_length]))

    def _written(self, messages: Sequence[Message], answers: bool = False) -> list[int]:
        """The messages as tokens; with `answers` up to where the next answer starts."""
        if self.reader.chat_template:
            settings = {"add_generation_prompt": answers, "return_dict": False}
            return list(self.reader.apply_chat_template(list(messages), **settings))
        start = [self.reader.bos_token_id] if self.reader.bos_token_id not in (None, self.reader.eos_token_id) else []
        for message in messages:
            start += self.reader(message["content"], add_special_tokens=False).input_ids
            start += [self.reader.eos_token_id] if message["role"] == "assistant" else self._line()
        return start

    def _line(self) -> list[int]:
        return list(self.reader("\n", add_special_tokens=False).input_ids)

    def show(self, row: dict[str, Any]) -> list[Piece]:
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        spans = itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORED)
        return [(self.reader.decode([token for token, _ in span]), learned) for learned, span in spans]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Padded by length, never by token: the token that pads may be the one that ends an answer."""
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        # In packed blocks each token that pads is a row of its own, at the position 0.
        filled = {"input_ids": self.reader.pad_token_id, "attention_mask": 0, "position_ids": 0, "labels": IGNORED}
        return {
            name: torch.tensor([padded(row[name], width, value, before=False) for row in rows])
            for name, value in filled.items()
            if name in rows[0]
        }

    def reduced(self, logits: Any, labels: Any) -> Any:
        """Of each row the sum of -log p over its learned tokens, their number, and how many were guessed: (B, 3)."""
        import torch
        from torch.nn import functional as F

        logits = logits[0] if isinstance(logits, tuple) else logits
        truth, guess = labels[:, 1:], logits[:, :-1]
        losses = F.cross_entropy(guess.transpose(1, 2).float(), truth, ignore_index=IGNORED, reduction="none")
        learned = truth != IGNORED
        hits = (guess.argmax(-1) == truth) & learned
        return torch.stack([losses.sum(-1), learned.sum(-1), hits.sum(-1)], -1)

    def metrics(self, evaluation: Any, rows: Any) -> dict[str, float]:
        import math

        loss, tokens, hits = evaluation.predictions.sum(0).tolist()
        return {"perplexity": math.exp(min(loss / tokens, 700)), "token_accuracy": hits / tokens}

    def example(self) -> dict[str, Any]:
        rows = [self.reader(" ".join(WORDS[:n])).input_ids[: self.max_length] for n in range(1, len(WORDS) + 1)]
        batch = self.collate([_row(row, row) for row in rows])
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def asked(self, texts: Sequence[str]) -> list[Any]:
        return list(texts)  # each a prompt, also where rows have an input behind it

    def inputs(self, path: Path) -> list[Any]:
        """The prompts of a file: one a line in a .txt, else from the columns trained on."""
        if path.suffix == ".txt":
            found: list[Any] = rows.lines(path)
        else:
            table = rows.read(path)
            kept = self.given()
            columns.check(path, table, kept.values())
            cells = {name: [self.cell(name, value, None) for value in table[column]] for name, column in kept.items()}
            found = [row.get("messages") or row.get("text") or _asked(row) for row in _rows(cells)]
        if not found:
            raise DataError(f"{path} holds no text.")
        return found

    def predict(self, model: Any, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """What the model writes after each prompt, greedily, up to NEW_TOKENS."""
        return [{"text": self.reply(model, given)} for given in inputs]

    def reply(self, model: Any, given: Any, **settings: Any) -> str:
        """What the model writes after a prompt. settings: for `generate`."""
        import torch

        ids = self.prompt(given)[-self.max_length :]
        asked = torch.tensor([ids], device=model.device)
        greedy = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": self.reader.pad_token_id}
        with torch.inference_mode():
            written = model.eval().generate(
                input_ids=asked, attention_mask=torch.ones_like(asked), **{**greedy, **settings}
            )
        return str(self.reader.decode(written[0, len(ids) :], skip_special_tokens=True).strip())

    def prompt(self, given: Any) -> list[int]:
        """What the model reads before it answers: messages, or a text as it was trained on."""
        if "text" in self.names:
            ids: list[int] = self.reader(given).input_ids
            return ids[:-1] if len(ids) > 1 and ids[-1] == self.reader.eos_token_id else ids
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
        if messages[-1]["role"] == "assistant":  # of a finished chat, the last answer is what is asked for
            messages = messages[:-1]
        return self._written(messages, answers=True)


def _message(part: dict[str, Any]) -> Message:
    role, content = (part["role"], part["content"]) if "role" in part else (part["from"], part["value"])
    return {"role": ROLES.get(role, role), "content": content}


def _asked(row: dict[str, str]) -> str:
    return f"{row['prompt']}\n\n{row['input']}" if row.get("input") else row["prompt"]


def _rows(cells: Cells) -> list[dict[str, Any]]:
    return [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]


def _messages(row: dict[str, Any]) -> list[Message]:
    if "messages" in row:
        return list(row["messages"])
    return [{"role": "user", "content": _asked(row)}, {"role": "assistant", "content": row["answer"]}]


def _row(ids: list[int], labels: list[int]) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
