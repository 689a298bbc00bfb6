"""What tasks over photos share: upright, in the model's colours. And what those share that read or write text, too."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .. import watch
from ..errors import DataError
from . import collection, models
from .collection import Media
from .media import MediaTask


@dataclass(frozen=True)
class ImageTask(MediaTask):
    """Photos are turned upright as their cameras noted, and brought to the model's size by its image processor."""

    endings: ClassVar[frozenset[str]] = frozenset(".bmp .gif .jfif .jpeg .jpg .png .ppm .pgm .tif .tiff .webp".split())

    @classmethod
    def load_reader(cls, model: str) -> Any:
        """Pillow's variant, everywhere: torchvision resizes in another way, and adapters go to other machines."""
        from transformers import AutoImageProcessor

        with models.loading(model):
            return AutoImageProcessor.from_pretrained(model, backend="pil")

    @property
    def processor(self) -> Any:
        """The image processor: beside a tokenizer, or by itself."""
        return getattr(self.reader, "image_processor", self.reader)

    def decoded(self, file: Media) -> Any:
        from PIL import Image, ImageOps, UnidentifiedImageError

        packed = collection.content(file)
        try:
            with Image.open(io.BytesIO(packed)) as image:
                if image.mode.startswith(("I", "F")):  # Pillow would cut them off at 255
                    raise DataError(f"{collection.title(file)} has more than 8 bits a channel. Save it with 8.")
                upright = ImageOps.exif_transpose(image)
                return (upright.convert("RGBA") if image.mode == "P" else upright).convert(self._mode())
        except UnidentifiedImageError:
            raise DataError(f"{collection.title(file)} is no image of a known format.") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{collection.title(file)} is no image that can be read: {error}.") from None

    def _mode(self) -> str:
        return "L" if len(self.processor.image_mean or ()) == 1 else "RGB"

    def check(self, files: Sequence[Media]) -> None:
        """Read every file: what cannot be read is to be known before training. Raises: DataError."""
        for file in watch.through("Reading photos", files):
            self.decoded(file)

    def features(self, decoded: Sequence[Any]) -> dict[str, Any]:
        return dict(self.processor(list(decoded), return_tensors="pt"))

    def noise(self) -> list[Any]:
        import numpy as np
        from PIL import Image

        drawn = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
        return [Image.fromarray(image).convert(self._mode()) for image in drawn]


@dataclass(frozen=True)
class ImageTextReader:
    """A model's image processor and its tokenizer, whether they were saved as one processor or not."""

    image_processor: Any
    tokenizer: Any

    def save_pretrained(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class ImageTextTask(ImageTask):
    @classmethod
    def load_reader(cls, model: str) -> ImageTextReader:
        return ImageTextReader(super().load_reader(model), models.tokenizer(model))
