"""Image to text: a caption of a photo, or what is written in it. Scores of what a model writes: BLEU, chrF, ROUGE.

By vision encoder-decoders such as ViT-GPT2 and TrOCR; by BLIP and GIT; and by models that chat about photos, such as
LLaVA and SmolVLM, which their processor's chat template tells. data.prefix is what these are asked beside the photo.
"""

from collections.abc import Sequence
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
from .token_classification import IGNORED


@dataclass(frozen=True)
class ImageToText(ImageTextTask, MediaToText):
    """end: the token that ends a text. Texts of more than max_length tokens are cut.

    joined: the model reads and writes one sequence: its `start` token, or the chat up to the answer, and then the text.
    """

    usual: ClassVar[dict[str, tuple[str, ...]]] = {
        "file": ("file", "file_name", "filename", "image", "img", "path", "filepath", "image_id", "id"),
        "text": ("text", "caption", "sentence", "description", "label", "title"),
    }
    reads: ClassVar[frozenset[str]] = frozenset({"max_length", "prefix"})
    auto: ClassVar[str] = "AutoModelForImageTextToText"
    metric: ClassVar[str] = "chrf"

    end: int
    joined: bool
    prefix: str

    @classmethod
    def fitted(cls, cells: dict[str, Cells], names: dict[str, str], data: Data, model: str) -> Self:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

        with models.loading(model):
            config = AutoConfig.from_pretrained(model)
        kind, texts = config.model_type, config.get_text_config()
        if kind not in (*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "vision-encoder-decoder"):
            raise ConfigError(f"{model} is a {kind} model, which does not write of photos.")
        reader = cls.load_reader(model)
        words = reader.tokenizer
        if kind == "vision-encoder-decoder":
            start, end, pad = config.decoder_start_token_id, config.eos_token_id, config.pad_token_id
            end = words.sep_token_id if end is None else end
        elif kind in ("blip", "git"):
            start, pad = texts.bos_token_id, texts.pad_token_id
            end = texts.sep_token_id if kind == "blip" else texts.eos_token_id
        elif _chats(reader):
            start = end = pad = words.eos_token_id
        else:
            raise ConfigError(
                f"{model} is a {kind} model, and its processor has no chat template: how it reads a photo and text is "
                "not known. Without one this task takes vision-encoder-decoder, blip and git models."
            )
        if data.prefix and not _chats(reader):
            raise ConfigError(f"data.prefix is of no use: {model}, a {kind} model, is asked nothing beside the photo.")
        if None in (start, pad, end):
            raise ConfigError(
                f"The config.json of {model} should say which tokens start, end and pad a text: "
                "decoder_start_token_id (of BLIP and GIT bos_token_id), eos_token_id and pad_token_id."
            )
        limit = TextTask.limit(data, model, words)
        return cls(names, reader, start, limit, end, kind != "vision-encoder-decoder", data.prefix or "")

    @classmethod
    def load_reader(cls, model: str) -> Any:
        """The processor of a model that chats, which gives a photo its tokens; of others both of its parts."""
        from transformers import AutoProcessor

        with models.loading(model):
            found = AutoProcessor.from_pretrained(model, backend="pil")
        return found if _chats(found) else super().load_reader(model)

    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        import datasets

        self.check(cells["file"])
        labels = [self.labels(text) for text in cells["text"]]
        if cut := sum(len(ids) > self.max_length for ids in labels):
            say(f"{split}: {cut} of {len(labels)} texts cut to {self.max_length} tokens")
        return datasets.Dataset.from_dict({"file": cells["file"], "labels": [ids[: self.max_length] for ids in labels]})

    def labels(self, text: str) -> list[int]:
        if _chats(self.reader):
            ids = self._answer(text)
        else:
            first = self.tokenizer.cls_token_id if self.joined else self.start  # BLIP puts another in its place
            ids = self.tokenizer(text).input_ids
            ids = ids[1:] if ids[:1] == [first] else ids
        return ids if self.end in ids[-2:] else [*ids, self.end]  # behind it a template may break the line

    def _answer(self, text: str) -> list[int]:
        """What a chat goes on with. Raises: ConfigError."""
        asked = self._chat(None)
        whole = [*asked, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        write = self.reader.apply_chat_template
        before, after = (
            self.tokenizer(written, add_special_tokens=False).input_ids
            for written in (write(asked, add_generation_prompt=True), write(whole))
        )
        if after[: len(before)] != before:
            raise ConfigError("The chat template writes what is asked differently where an answer follows.")
        return list(after[len(before) :])

    def _chat(self, photo: Any) -> list[dict[str, Any]]:
        words = [{"type": "text", "text": self.prefix}] if self.prefix else []
        return [{"role": "user", "content": [{"type": "image", "image": photo}, *words]}]

    def features(self, decoded: Sequence[Any]) -> dict[str, Any]:
        if not _chats(self.reader):
            return super().features(decoded)
        # Padded on the left, for all texts begin at the same place then, in training as in generation.
        settings = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        chats = [self._chat(photo) for photo in decoded]
        return dict(
            self.reader.apply_chat_template(
                chats, tokenize=True, return_dict=True, add_generation_prompt=True, processor_kwargs=settings
            )
        )

    def learned(self, batch: dict[str, Any], labels: list[list[int]]) -> dict[str, Any]:
        import torch

        after = super().learned({}, labels)["labels"]  # (B, T)
        if not self.joined:
            return {**batch, "labels": after}
        before = batch.get("input_ids", after.new_full((len(after), 1), self.start))  # (B, P)
        pad = self.tokenizer.pad_token_id
        text = {"input_ids": after.masked_fill(after == IGNORED, pad), "attention_mask": (after != IGNORED).long()}
        # Whatever else is told of each token, such as which are a photo's, is 0 for a text's.
        prompt = {name: value for name, value in batch.items() if value.shape == before.shape}
        prompt = {"attention_mask": torch.ones_like(before), **prompt, "input_ids": before}
        both = {
            name: torch.cat([value, text.get(name, torch.zeros_like(after)).to(value)], 1)
            for name, value in prompt.items()
        }
        return {**batch, **both, "labels": torch.cat([torch.full_like(before, IGNORED), after], 1)}

    def write(self, model: Any, batch: dict[str, Any]) -> Any:
        """Without the prompt, which a model of one sequence repeats."""
        if not self.joined:
            return super().write(model, batch)
        if not _chats(self.reader):
            return super().write(model, {"pixel_values": batch["pixel_values"]})[:, 1:]
        known = batch["input_ids"].shape
        start = int((batch["labels"] != IGNORED).any(0).nonzero()[0]) if "labels" in batch else known[1]
        asked = {name: value[:, :start] if value.shape == known else value for name, value in batch.items()}
        return super().write(model, asked)[:, start:]

    def show(self, row: dict[str, Any]) -> list[Piece]:
        asked: list[Piece] = []
        if _chats(self.reader):
            asked = [(self.reader.apply_chat_template(self._chat(None), add_generation_prompt=True), False)]
        return [(collection.title(row["file"]), False), *asked, (self.tokenizer.decode(row["labels"]), True)]

    def length(self, row: dict[str, Any]) -> int:
        return len(row["labels"])

    def metrics(self, evaluation: Any, rows: Any) -> dict[str, float]:
        """BLEU and chrF of the whole, from 0 to 100; ROUGE's F1, the mean over rows, from 0 to 1."""
        return scores(self.written(evaluation), self.texts(rows["labels"]))


def _chats(reader: Any) -> bool:
    return bool(getattr(reader, "chat_template", None)) and hasattr(reader, "image_processor")
