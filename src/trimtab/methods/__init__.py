"""The methods: one file each, and the table of their names."""

from ..adapter import PeftConfig as PeftConfig  # from here, where all methods are known by which it reads files
from .adalora import AdaLoraConfig
from .beft import BeftConfig
from .bitfit import BitFitConfig
from .boft import BOFTConfig
from .bottleneck import BottleneckConfig
from .c3a import C3AConfig
from .compacter import CompacterConfig
from .cpt import CPTConfig
from .delora import DeloraConfig
from .fourierft import FourierFTConfig
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
from .miss import MissConfig
from .multitask_prompt_tuning import MultitaskPromptTuningConfig
from .oft import OFTConfig
from .p_tuning import PromptEncoderConfig
from .peanut import PeanutConfig
from .poly import PolyConfig
from .prefix_tuning import PrefixTuningConfig
from .prompt_tuning import PromptTuningConfig
from .psoft import PsoftConfig
from .pvera import PveraConfig
from .randlora import RandLoraConfig
from .road import RoadConfig
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
    "beft": BeftConfig,
    "bitfit": BitFitConfig,
    "boft": BOFTConfig,
    "bottleneck": BottleneckConfig,
    "c3a": C3AConfig,
    "compacter": CompacterConfig,
    "cpt": CPTConfig,
    "delora": DeloraConfig,
    "fourierft": FourierFTConfig,
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
    "miss": MissConfig,
    "multitask_prompt_tuning": MultitaskPromptTuningConfig,
    "oft": OFTConfig,
    "p_tuning": PromptEncoderConfig,
    "peanut": PeanutConfig,
    "poly": PolyConfig,
    "prefix_tuning": PrefixTuningConfig,
    "prompt_tuning": PromptTuningConfig,
    "psoft": PsoftConfig,
    "pvera": PveraConfig,
    "randlora": RandLoraConfig,
    "road": RoadConfig,
    "shira": ShiraConfig,
    "tinylora": TinyLoraConfig,
    "trainable_tokens": TrainableTokensConfig,
    "unilora": UniLoraConfig,
    "unipelt": UniPeltConfig,
    "vblora": VBLoRAConfig,
    "vera": VeraConfig,
    "waveft": WaveFTConfig,
}
