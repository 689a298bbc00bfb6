"""The methods: one file each, and the table of their names."""

from ..adapter import PeftConfig
from .bitfit import BitFitConfig
from .boft import BOFTConfig
from .hra import HRAConfig
from .ia3 import IA3Config
from .ln_tuning import LNTuningConfig
from .loha import LoHaConfig
from .lokr import LoKrConfig
from .lora import LoraConfig
from .oft import OFTConfig
from .trainable_tokens import TrainableTokensConfig
from .vera import VeraConfig

METHODS: dict[str, type[PeftConfig]] = {
    "bitfit": BitFitConfig,
    "boft": BOFTConfig,
    "hra": HRAConfig,
    "ia3": IA3Config,
    "ln_tuning": LNTuningConfig,
    "loha": LoHaConfig,
    "lokr": LoKrConfig,
    "lora": LoraConfig,
    "oft": OFTConfig,
    "trainable_tokens": TrainableTokensConfig,
    "vera": VeraConfig,
}
