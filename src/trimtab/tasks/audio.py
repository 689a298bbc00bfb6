"""What tasks over recordings share: samples at the rate that the model hears, and the longest that it takes."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .. import watch
from ..errors import DataError
from . import collection
from .collection import Media
from .media import MediaTask

SECONDS = 2.0  # of noise
RATES = (1_000, 1_000_000)  # samples a second; beyond, a few bytes of a broken file would fill the memory


@dataclass(frozen=True)
class AudioTask(MediaTask):
    """Channels are averaged and samples brought to the feature extractor's rate."""

    endings: ClassVar[frozenset[str]] = frozenset(".aif .aiff .au .flac .mp3 .oga .ogg .opus .wav".split())

    @property
    def extractor(self) -> Any:
        """The feature extractor: of a processor, or by itself."""
        return getattr(self.reader, "feature_extractor", self.reader)

    def decoded(self, file: Media) -> Any:
        """Samples (T,) in float32."""
        import numpy as np
        import soundfile
        from scipy.signal import resample_poly

        packed = collection.content(file)
        try:
            samples, rate = soundfile.read(io.BytesIO(packed), dtype="float32", always_2d=True)  # (T, channels)
        except (soundfile.SoundFileError, RuntimeError) as error:
            reason = getattr(error, "error_string", error)
            raise DataError(f"{collection.title(file)} is no recording that can be read: {reason}") from None
        if _is_cut(packed):
            raise DataError(f"{collection.title(file)} is cut off: it is shorter than it says.")
        mono = samples.mean(1)
        if not len(mono):
            raise DataError(f"{collection.title(file)} holds no samples.")
        if not np.isfinite(mono).all():
            raise DataError(f"{collection.title(file)} holds samples that are no numbers.")
        if not RATES[0] <= rate <= RATES[1]:
            raise DataError(f"{collection.title(file)} says that it has {rate} samples a second: it is damaged.")
        wanted = int(self.extractor.sampling_rate)
        if rate != wanted:
            common = math.gcd(rate, wanted)
            mono = resample_poly(mono, wanted // common, rate // common).astype(np.float32)
        return mono

    def features(self, decoded: Sequence[Any]) -> dict[str, Any]:
        given: dict[str, Any] = {"sampling_rate": self.extractor.sampling_rate, "return_tensors": "pt"}
        if self.longest() is None:  # others fill up to their longest by themselves
            given["padding"] = True
        return dict(self.extractor(list(decoded), **given))

    def longest(self) -> float | None:
        """The seconds beyond which the feature extractor cuts, if it does."""
        extractor = self.extractor
        if samples := getattr(extractor, "n_samples", None):  # Whisper
            return float(samples / extractor.sampling_rate)
        if hasattr(extractor, "num_mel_bins") and hasattr(extractor, "max_length"):  # AST: frames of 10 ms
            return float(extractor.max_length / 100)
        return None

    def seconds(self, files: Sequence[Media]) -> list[float]:
        rate = self.extractor.sampling_rate
        return [float(len(self.decoded(file)) / rate) for file in watch.through("Reading recordings", files)]

    def length(self, row: dict[str, Any]) -> int:
        seconds: float = row["seconds"]
        return math.ceil(seconds)

    def noise(self) -> list[Any]:
        import numpy as np

        size = int(SECONDS * self.extractor.sampling_rate)
        return list(np.random.default_rng(0).normal(0, 0.1, (4, size)).astype(np.float32))


def _is_cut(packed: bytes) -> bool:
    """Whether a WAV file ends before its end.

    Some count the header's 8 bytes, too, and who writes to a pipe says that it is as long as can be.
    """
    size = int.from_bytes(packed[4:8], "little")
    return packed[:4] == b"RIFF" and len(packed) < size < 0x7FFFF000
