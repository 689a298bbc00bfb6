"""The methods: one file each, and the table of their names."""

from ..adapter import PeftConfig
from .lora import LoraConfig

METHODS: dict[str, type[PeftConfig]] = {
    "lora": LoraConfig,
}
