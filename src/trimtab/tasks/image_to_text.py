"""Image to text: a caption of a photo, or what is written in it, by a vision encoder-decoder such as ViT-GPT2 or TrOCR.

Scores of what it writes: BLEU, chrF, ROUGE.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..errors import ConfigError
from . import collection, models
from .columns import Cells, Say
from .image import ImageTextTask
from .media import MediaToText
from .task import Data, Piece
from .text import TextTask
from .text2text_generation import scores


@dataclass(frozen=True)
class ImageToText(ImageTextTask, MediaToText):
    """end: the token that ends a text. Texts of more than max_length tokens are cut."""

    usual: ClassVar[dict[str, tuple[str, ...]]] = {
        "file": ("file", "file_name", "filename", "image", "img", "path", "filepath", "image_id", "id"),
        "text": ("text", "caption", "sentence", "description", "label", "title"),
    }
    reads: ClassVar[frozenset[str]] = frozenset({"max_length"})
    auto: ClassVar[str] = "AutoModelForImageTextToText"
    metric: ClassVar[str] = "chrf"

    end: int

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
        return cls(names, reader, config.decoder_start_token_id, limit, end)

    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        import datasets

        self.check(cells["file"])
        labels = [self.labels(text) for text in cells["text"]]
        if cut := sum(len(ids) > self.max_length for ids in labels):
            say(f"{split}: {cut} of {len(labels)} texts cut to {self.max_length} tokens")
        return datasets.Dataset.from_dict({"file": cells["file"], "labels": [ids[: self.max_length] for ids in labels]})

    def labels(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text).input_ids
        ids = ids[1:] if ids[:1] == [self.start] else ids
        return ids if ids[-1:] == [self.end] else [*ids, self.end]

    def show(self, row: dict[str, Any]) -> list[Piece]:
        return [(collection.title(row["file"]), False), (self.tokenizer.decode(row["labels"]), True)]

    def length(self, row: dict[str, Any]) -> int:
        return len(row["labels"])

    def metrics(self, evaluation: Any, rows: Any) -> dict[str, float]:
        """BLEU and chrF of the whole, from 0 to 100; ROUGE's F1, the mean over rows, from 0 to 1."""
        return scores(self.written(evaluation), self.texts(rows["labels"]))
