"""Speech recognition: what is said in a recording, written by an encoder-decoder such as Whisper. Scores: WER, CER."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..errors import ConfigError, DataError
from . import collection, models
from .audio import AudioTask
from .columns import Cells, Say
from .media import MediaToText
from .task import Data, Piece


@dataclass(frozen=True)
class SpeechRecognition(AudioTask, MediaToText):
    usual: ClassVar[dict[str, tuple[str, ...]]] = {
        "file": ("file", "file_name", "filename", "audio", "path", "filepath", "id"),
        "text": ("text", "sentence", "transcript", "transcription", "normalized_text", "label"),
    }
    auto: ClassVar[str] = "AutoModelForSpeechSeq2Seq"
    metric: ClassVar[str] = "wer"
    higher_is_better: ClassVar[bool] = False

    @classmethod
    def load_reader(cls, model: str) -> Any:
        from transformers import AutoProcessor

        with models.loading(model):
            found = AutoProcessor.from_pretrained(model)
        if found.tokenizer.pad_token is None:
            found.tokenizer.pad_token = found.tokenizer.eos_token
        return found

    @classmethod
    def fitted(cls, cells: dict[str, Cells], names: dict[str, str], data: Data, model: str) -> Self:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

        with models.loading(model):
            config = AutoConfig.from_pretrained(model)
        if config.model_type not in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
            raise ConfigError(
                f"{model} is a {config.model_type} model, which does not write text. Speech recognition needs an "
                "encoder-decoder, such as Whisper."
            )
        decoder = config.get_text_config(decoder=True)
        longest = getattr(decoder, "max_target_positions", None) or decoder.max_position_embeddings
        return cls(names, cls.load_reader(model), config.decoder_start_token_id, longest)

    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        """Rows without those of which a part would be lost: what is not heard cannot be learned to be written."""
        import datasets

        labels = [self.labels(text) for text in cells["text"]]
        seconds = self.seconds(cells["file"])
        limit = self.longest() or float("inf")
        if too_long := sum(length > limit for length in seconds):
            say(f"{split}: {too_long} rows dropped, whose recordings are longer than {limit:g} seconds")
        heard = [i for i in range(len(labels)) if seconds[i] <= limit]
        kept = [i for i in heard if len(labels[i]) <= self.max_length]
        if len(kept) < len(heard):
            say(f"{split}: {len(heard) - len(kept)} rows dropped, whose texts are longer than {self.max_length} tokens")
        if not kept:
            raise DataError(f"{split}: all rows are too long, the first with {seconds[0]:g} seconds.")
        rows = {"file": cells["file"], "seconds": seconds, "labels": labels}
        return datasets.Dataset.from_dict({name: [values[i] for i in kept] for name, values in rows.items()})

    def labels(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text).input_ids
        return ids[1:] if ids[0] == self.start else ids

    def show(self, row: dict[str, Any]) -> list[Piece]:
        heard = f"{collection.title(row['file'])} ({row['seconds']:.1f} s)"
        return [(heard, False), (self.tokenizer.decode(row["labels"]), True)]

    def length(self, row: dict[str, Any]) -> int:
        return super().length(row) + len(row["labels"])

    def metrics(self, evaluation: Any, rows: Any) -> dict[str, float]:
        """Errors of words and of characters over all rows, from 0; above 1 where more is written than was said."""
        import jiwer

        wanted, found = self.texts(rows["labels"]), self.written(evaluation)
        return {"wer": float(jiwer.wer(wanted, found)), "cer": float(jiwer.cer(wanted, found))}
