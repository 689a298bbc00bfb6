"""Audio classification: a recording to one of several classes."""

from dataclasses import dataclass
from typing import Any, ClassVar

from . import models
from .audio import AudioTask
from .columns import Cells, Say
from .media import MediaClassification


@dataclass(frozen=True)
class AudioClassification(AudioTask, MediaClassification):
    """Long recordings are cut to what the model hears."""

    auto: ClassVar[str] = "AutoModelForAudioClassification"

    @classmethod
    def load_reader(cls, model: str) -> Any:
        from transformers import AutoFeatureExtractor

        with models.loading(model):
            return AutoFeatureExtractor.from_pretrained(model)

    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        seconds = self.seconds(cells["file"])
        limit = self.longest()
        if limit is not None and (cut := sum(length > limit for length in seconds)):
            say(f"{split}: {cut} of {len(seconds)} recordings cut to {limit:g} seconds")
        return self.encoded(cells, split, seconds=seconds)
