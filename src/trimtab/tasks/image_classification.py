"""Image classification: a photo to one of several classes."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import DataError
from . import collection, models
from .collection import Media
from .columns import Cells, Say
from .media import MediaClassification


@dataclass(frozen=True)
class ImageClassification(MediaClassification):
    """Photos are turned upright as their cameras noted, and brought to the model's size by its image processor."""

    endings: ClassVar[frozenset[str]] = frozenset(".bmp .gif .jfif .jpeg .jpg .png .ppm .pgm .tif .tiff .webp".split())
    auto: ClassVar[str] = "AutoModelForImageClassification"

    @classmethod
    def load_reader(cls, model: str) -> Any:
        """Pillow's variant, everywhere: torchvision resizes in another way, and adapters go to other machines."""
        from transformers import AutoImageProcessor

        with models.loading(model):
            return AutoImageProcessor.from_pretrained(model, backend="pil")

    def decoded(self, file: Media) -> Any:
        from PIL import Image, ImageOps

        packed = collection.content(file)
        try:
            with Image.open(io.BytesIO(packed)) as image:
                if image.mode.startswith(("I", "F")):  # Pillow would cut them off at 255
                    raise DataError(f"{collection.title(file)} has more than 8 bits a channel. Save it with 8.")
                upright = ImageOps.exif_transpose(image)
                return (upright.convert("RGBA") if image.mode == "P" else upright).convert(self._mode())
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{collection.title(file)} is no image that can be read: {error}.") from None

    def _mode(self) -> str:
        return "L" if len(self.reader.image_mean or ()) == 1 else "RGB"

    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        for file in cells["file"]:  # what cannot be read is to be known before training
            self.decoded(file)
        return self.encoded(cells, split)

    def features(self, decoded: Sequence[Any]) -> dict[str, Any]:
        return dict(self.reader(list(decoded), return_tensors="pt"))

    def noise(self) -> list[Any]:
        import numpy as np
        from PIL import Image

        drawn = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
        return [Image.fromarray(image).convert(self._mode()) for image in drawn]
