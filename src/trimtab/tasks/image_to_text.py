"""Image to text: a caption of a photo, or what is written in it, by a vision encoder-decoder such as ViT-GPT2 or TrOCR.

Scores of what it writes: BLEU, chrF, ROUGE.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..errors import ConfigError
from . import collection, models
from .columns import Cells, Say
from .image import ImageTextTask
from .media import BATCH
from .task import Data, Piece
from .text import TextTask
from .text2text_generation import scores
from .token_classification import IGNORED, padded


@dataclass(frozen=True)
class ImageToText(ImageTextTask):
    """The decoder's inputs are the labels, shifted by the model, which puts its `start` token before them.

    end: the token that ends a text. max_length: tokens of a text; longer ones are cut.
    """

    usual: ClassVar[dict[str, tuple[str, ...]]] = {
        "file": ("file", "file_name", "filename", "image", "img", "path", "filepath", "image_id", "id"),
        "text": ("text", "caption", "sentence", "description", "label", "title"),
    }
    answer: ClassVar[str] = "text"
    reads: ClassVar[frozenset[str]] = frozenset({"max_length"})
    auto: ClassVar[str] = "AutoModelForImageTextToText"
    metric: ClassVar[str] = "chrf"
    generates: ClassVar[bool] = True

    start: int
    end: int
    max_length: int

    @classmethod
    def fitted(cls, cells: dict[str, Cells], names: dict[str, str], data: Data, model: str) -> Self:
        from transformers import AutoConfig

        with models.loading(model):
            config = AutoConfig.from_pretrained(model)
        if config.model_type != "vision-encoder-decoder":
            raise ConfigError(
                f"{model} is a {config.model_type} model. This task takes vision-encoder-decoder models; those that "
                "read photos as tokens of a prompt are not known to it yet."
            )
        reader = cls.load_reader(model)
        end = reader.tokenizer.sep_token_id if config.eos_token_id is None else config.eos_token_id
        if None in (config.decoder_start_token_id, config.pad_token_id, end):
            raise ConfigError(
                f"The config.json of {model} should say which tokens start, end and pad a text: "
                "decoder_start_token_id, eos_token_id and pad_token_id."
            )
        limit = TextTask.limit(data, model, reader.tokenizer)
        return cls(names, reader, config.decoder_start_token_id, end, limit)

    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        import datasets

        self.check(cells["file"])
        labels = [self._labels(text) for text in cells["text"]]
        if cut := sum(len(ids) > self.max_length for ids in labels):
            say(f"{split}: {cut} of {len(labels)} texts cut to {self.max_length} tokens")
        return datasets.Dataset.from_dict({"file": cells["file"], "labels": [ids[: self.max_length] for ids in labels]})

    def _labels(self, text: str) -> list[int]:
        ids: list[int] = self.reader.tokenizer(text).input_ids
        ids = ids[1:] if ids[:1] == [self.start] else ids
        return ids if ids[-1:] == [self.end] else [*ids, self.end]

    def show(self, row: dict[str, Any]) -> list[Piece]:
        return [(collection.title(row["file"]), False), (self.reader.tokenizer.decode(row["labels"]), True)]

    def length(self, row: dict[str, Any]) -> int:
        return len(row["labels"])

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.batch(row["file"] for row in rows), **self._targets([row["labels"] for row in rows])}

    def _targets(self, labels: list[list[int]]) -> dict[str, Any]:
        import torch

        width = max(map(len, labels))
        return {"labels": torch.tensor([padded(row, width, IGNORED, before=False) for row in labels])}

    def metrics(self, evaluation: Any, rows: Any) -> dict[str, float]:
        """BLEU and chrF of the whole, from 0 to 100; ROUGE's F1, the mean over rows, from 0 to 1."""
        import numpy as np

        written = np.where(evaluation.predictions == IGNORED, self.end, evaluation.predictions)
        return scores(self._texts(written), self._texts(rows["labels"]))

    def _texts(self, ids: Any) -> list[str]:
        return [text.strip() for text in self.reader.tokenizer.batch_decode(list(ids), skip_special_tokens=True)]

    def example(self) -> dict[str, Any]:
        noise, labels = self.noise(), self._labels("one two three")[: self.max_length]
        return {**self.features(noise), **self._targets([labels] * len(noise))}

    def predict(self, model: Any, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """What the model writes for each photo."""
        import torch

        found: list[dict[str, Any]] = []
        for start in range(0, len(inputs), BATCH):
            batch = self.batch(inputs[start : start + BATCH])
            with torch.inference_mode():
                ids = model.eval().generate(**{name: value.to(model.device) for name, value in batch.items()})
            found += [{"text": text} for text in self._texts(ids)]
        return found
