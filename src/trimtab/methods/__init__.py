"""The methods: one file each, and the table of their names."""

from ..adapter import PeftConfig
from .bitfit import BitFitConfig
from .ia3 import IA3Config
from .ln_tuning import LNTuningConfig
from .lora import LoraConfig

METHODS: dict[str, type[PeftConfig]] = {
    "bitfit": BitFitConfig,
    "ia3": IA3Config,
    "ln_tuning": LNTuningConfig,
    "lora": LoraConfig,
}
