"""The methods: one file each, and the table of their names."""

from ..adapter import PeftConfig
from .adalora import AdaLoraConfig
from .bitfit import BitFitConfig
from .boft import BOFTConfig
from .bottleneck import BottleneckConfig
from .compacter import CompacterConfig
from .cpt import CPTConfig
from .delora import DeloraConfig
from .fourierft import FourierFTConfig
from .full import FullConfig
from .hra import HRAConfig
from .ia3 import IA3Config
from .llama_adapter import AdaptionPromptConfig
from .ln_tuning import LNTuningConfig
from .loha import LoHaConfig
from .lokr import LoKrConfig
from .lora import LoraConfig
from .loreft import LoReftConfig
from .mam import MamConfig
from .miss import MissConfig
from .multitask_prompt_tuning import MultitaskPromptTuningConfig
from .oft import OFTConfig
from .p_tuning import PromptEncoderConfig
from .poly import PolyConfig
from .prefix_tuning import PrefixTuningConfig
from .prompt_tuning import PromptTuningConfig
from .randlora import RandLoraConfig
from .shira import ShiraConfig
from .tinylora import TinyLoraConfig
from .trainable_tokens import TrainableTokensConfig
from .unilora import UniLoraConfig
from .unipelt import UniPeltConfig
from .vblora import VBLoRAConfig
from .vera import VeraConfig
from .waveft import WaveFTConfig

METHODS: dict[str, type[PeftConfig]] = {
    "adalora": AdaLoraConfig,
    "bitfit": BitFitConfig,
    "boft": BOFTConfig,
    "bottleneck": BottleneckConfig,
    "compacter": CompacterConfig,
    "cpt": CPTConfig,
    "delora": DeloraConfig,
    "fourierft": FourierFTConfig,
    "full": FullConfig,
    "hra": HRAConfig,
    "ia3": IA3Config,
    "llama_adapter": AdaptionPromptConfig,
    "ln_tuning": LNTuningConfig,
    "loha": LoHaConfig,
    "lokr": LoKrConfig,
    "lora": LoraConfig,
    "loreft": LoReftConfig,
    "mam": MamConfig,
    "miss": MissConfig,
    "multitask_prompt_tuning": MultitaskPromptTuningConfig,
    "oft": OFTConfig,
    "p_tuning": PromptEncoderConfig,
    "poly": PolyConfig,
    "prefix_tuning": PrefixTuningConfig,
    "prompt_tuning": PromptTuningConfig,
    "randlora": RandLoraConfig,
    "shira": ShiraConfig,
    "tinylora": TinyLoraConfig,
    "trainable_tokens": TrainableTokensConfig,
    "unilora": UniLoraConfig,
    "unipelt": UniPeltConfig,
    "vblora": VBLoRAConfig,
    "vera": VeraConfig,
    "waveft": WaveFTConfig,
}
