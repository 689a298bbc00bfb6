"""The methods: one file each, and the table of their names."""

from ..adapter import PeftConfig
from .adalora import AdaLoraConfig
from .bitfit import BitFitConfig
from .bottleneck import BottleneckConfig
from .ia3 import IA3Config
from .ln_tuning import LNTuningConfig
from .loha import LoHaConfig
from .lokr import LoKrConfig
from .lora import LoraConfig
from .p_tuning import PromptEncoderConfig
from .prefix_tuning import PrefixTuningConfig
from .prompt_tuning import PromptTuningConfig
from .vera import VeraConfig

METHODS: dict[str, type[PeftConfig]] = {
    "adalora": AdaLoraConfig,
    "bitfit": BitFitConfig,
    "bottleneck": BottleneckConfig,
    "ia3": IA3Config,
    "ln_tuning": LNTuningConfig,
    "loha": LoHaConfig,
    "lokr": LoKrConfig,
    "lora": LoraConfig,
    "p_tuning": PromptEncoderConfig,
    "prefix_tuning": PrefixTuningConfig,
    "prompt_tuning": PromptTuningConfig,
    "vera": VeraConfig,
}
