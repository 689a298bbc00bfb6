"""Text to text with an encoder-decoder: translation, summarization. What it writes is scored: BLEU, chrF, ROUGE."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..adapter import TaskType
from .columns import Cells, Say
from .task import Data, Piece
from .text import WORDS, TextTask
from .token_classification import IGNORED, padded


@dataclass(frozen=True)
class Text2TextGeneration(TextTask):
    """max_length is a source's and a target's. The decoder's inputs are the labels, shifted by the model itself.

    prefix: goes before each source, such as T5's "translate English to German: ".
    """

    usual: ClassVar[dict[str, tuple[str, ...]]] = {
        "source": ("source", "src", "input", "input_text", "text", "article", "document", "dialogue"),
        "target": ("target", "tgt", "output", "target_text", "summary", "highlights", "translation"),
    }
    answer: ClassVar[str] = "target"
    reads: ClassVar[frozenset[str]] = TextTask.reads | {"prefix"}
    task_type: ClassVar[TaskType] = TaskType.SEQ_2_SEQ_LM
    auto: ClassVar[str] = "AutoModelForSeq2SeqLM"
    metric: ClassVar[str] = "chrf"  # in any script, and not 0 where no four words in a row are right, as BLEU is
    generates: ClassVar[bool] = True

    prefix: str

    @classmethod
    def fitted(cls, cells: dict[str, Cells], names: dict[str, str], data: Data, model: str) -> Self:
        tokenizer = cls.load_reader(model)
        return cls(names, tokenizer, cls.limit(data, model, tokenizer), data.prefix or "")

    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        import datasets

        sources = self._sources(cells["source"])
        targets = self.tokenized(text_target=cells["target"])
        for name, encoded in {"sources": sources, "targets": targets}.items():
            self.say_cut(encoded, split, say, name)
        return datasets.Dataset.from_dict(
            {
                "input_ids": sources["input_ids"],
                "attention_mask": sources["attention_mask"],
                "labels": targets["input_ids"],
            }
        )

    def too_long(self, cells: Cells) -> set[int]:
        return self.longer(self._prefixed(cells["source"])) | self.longer(text_target=cells["target"])

    def _sources(self, texts: Sequence[str]) -> Any:
        return self.tokenized(self._prefixed(texts))

    def _prefixed(self, texts: Sequence[str]) -> list[str]:
        return [self.prefix + text for text in texts]

    def show(self, row: dict[str, Any]) -> list[Piece]:
        return [(self.reader.decode(row["input_ids"]), False), (self.reader.decode(row["labels"]), True)]

    def length(self, row: dict[str, Any]) -> int:
        return len(row["input_ids"]) + len(row["labels"])

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        read = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]
        width = max(len(row["labels"]) for row in rows)
        labels = torch.tensor([padded(row["labels"], width, IGNORED, before=False) for row in rows])
        return {**self.reader.pad(read, return_tensors="pt"), "labels": labels}

    def metrics(self, evaluation: Any, rows: Any) -> dict[str, float]:
        """BLEU and chrF of the whole, from 0 to 100; ROUGE's F1, the mean over rows, from 0 to 1."""
        import numpy as np

        written = np.where(evaluation.predictions == IGNORED, self.reader.pad_token_id, evaluation.predictions)
        return scores(self._texts(written), self._texts(rows["labels"]))

    def _texts(self, ids: Any) -> list[str]:
        return [text.strip() for text in self.reader.batch_decode(list(ids), skip_special_tokens=True)]

    def example(self) -> dict[str, Any]:
        texts = [" ".join(WORDS[:n]) for n in range(1, len(WORDS) + 1)]
        sources, targets = self._sources(texts), self.tokenized(text_target=texts[::-1])
        pairs = zip(sources["input_ids"], sources["attention_mask"], targets["input_ids"], strict=True)
        return self.collate(
            [{"input_ids": ids, "attention_mask": mask, "labels": labels} for ids, mask, labels in pairs]
        )

    def predict(self, model: Any, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """What the model writes for each text."""
        import torch

        found: list[dict[str, Any]] = []
        for texts in self.batches(inputs):
            batch = self.reader.pad(self._sources(texts), return_tensors="pt").to(model.device)
            with torch.inference_mode():
                written = self.write(model.eval(), {name: batch[name] for name in ("input_ids", "attention_mask")})
            found += [{"text": text} for text in self._texts(written)]
        return found


def scores(written: list[str], wanted: list[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu, corpus_chrf

    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"])
    each = [rouge.score(target, text) for text, target in zip(written, wanted, strict=True)]
    return {
        "bleu": corpus_bleu(written, [wanted], force=True).score,  # force: no advice on standard error
        "chrf": corpus_chrf(written, [wanted]).score,
        **{name: sum(row[name].fmeasure for row in each) / len(each) for name in each[0]},
    }
