"""The methods: one file each, and the table of their names."""

from ..adapter import PeftConfig
from .lora import LoraConfig
from .p_tuning import PromptEncoderConfig
from .prefix_tuning import PrefixTuningConfig
from .prompt_tuning import PromptTuningConfig

METHODS: dict[str, type[PeftConfig]] = {
    "lora": LoraConfig,
    "prompt_tuning": PromptTuningConfig,
    "p_tuning": PromptEncoderConfig,
    "prefix_tuning": PrefixTuningConfig,
}
