"""Image classification: a photo to one of several classes."""

from dataclasses import dataclass
from typing import Any, ClassVar

from .columns import Cells, Say
from .image import ImageTask
from .media import MediaClassification


@dataclass(frozen=True)
class ImageClassification(ImageTask, MediaClassification):
    auto: ClassVar[str] = "AutoModelForImageClassification"

    def encode(self, cells: Cells, split: str, say: Say) -> Any:
        self.check(cells["file"])
        return self.encoded(cells, split)
