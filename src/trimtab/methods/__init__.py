"""The methods: one file each, and the table of their names."""

from ..adapter import PeftConfig
from .adalora import AdaLoraConfig
from .beft import BeftConfig
from .bitfit import BitFitConfig
from .boft import BOFTConfig
from .bottleneck import BottleneckConfig
from .c3a import C3AConfig
from .compacter import CompacterConfig
from .cpt import CPTConfig
from .full import FullConfig
from .glora import GloraConfig
from .gralora import GraloraConfig
from .hira import HiraConfig
from .hra import HRAConfig
from .ia3 import IA3Config
from .lily import LilyConfig
from .llama_adapter import AdaptionPromptConfig
from .ln_tuning import LNTuningConfig
from .loha import LoHaConfig
from .lokr import LoKrConfig
from .lora import LoraConfig
from .loreft import LoReftConfig
from .mam import MamConfig
from .multitask_prompt_tuning import MultitaskPromptTuningConfig
from .oft import OFTConfig
from .p_tuning import PromptEncoderConfig
from .peanut import PeanutConfig
from .prefix_tuning import PrefixTuningConfig
from .prompt_tuning import PromptTuningConfig
from .psoft import PsoftConfig
from .pvera import PveraConfig
from .road import RoadConfig
from .trainable_tokens import TrainableTokensConfig
from .unipelt import UniPeltConfig
from .vera import VeraConfig

METHODS: dict[str, type[PeftConfig]] = {
    "adalora": AdaLoraConfig,
    "beft": BeftConfig,
    "bitfit": BitFitConfig,
    "boft": BOFTConfig,
    "bottleneck": BottleneckConfig,
    "c3a": C3AConfig,
    "compacter": CompacterConfig,
    "cpt": CPTConfig,
    "full": FullConfig,
    "glora": GloraConfig,
    "gralora": GraloraConfig,
    "hira": HiraConfig,
    "hra": HRAConfig,
    "ia3": IA3Config,
    "lily": LilyConfig,
    "llama_adapter": AdaptionPromptConfig,
    "ln_tuning": LNTuningConfig,
    "loha": LoHaConfig,
    "lokr": LoKrConfig,
    "lora": LoraConfig,
    "loreft": LoReftConfig,
    "mam": MamConfig,
    "multitask_prompt_tuning": MultitaskPromptTuningConfig,
    "oft": OFTConfig,
    "p_tuning": PromptEncoderConfig,
    "peanut": PeanutConfig,
    "prefix_tuning": PrefixTuningConfig,
    "prompt_tuning": PromptTuningConfig,
    "psoft": PsoftConfig,
    "pvera": PveraConfig,
    "road": RoadConfig,
    "trainable_tokens": TrainableTokensConfig,
    "unipelt": UniPeltConfig,
    "vera": VeraConfig,
}
