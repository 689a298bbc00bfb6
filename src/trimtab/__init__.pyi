"""The public names, and where each lives: `__init__.py` imports what is asked for."""

from .adapter import Adapter, InputAdapter, TaskType
from .auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from .errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DataError,
    MergeError,
    RecipeError,
    TargetError,
    TrainingError,
    TrimtabError,
)
from .kbit import prepare_model_for_int8_training, prepare_model_for_kbit_training
from .merge import QuantizedMergeWarning
from .methods import PeftConfig
from .methods.adalora import AdaLoraConfig
from .methods.beft import BeftConfig
from .methods.bitfit import BitFitConfig
from .methods.boft import BOFTConfig
from .methods.bottleneck import BottleneckConfig
from .methods.c3a import C3AConfig
from .methods.compacter import CompacterConfig
from .methods.cpt import CPTConfig
from .methods.delora import DeloraConfig
from .methods.fourierft import FourierFTConfig
from .methods.full import FullConfig
from .methods.glora import GloraConfig
from .methods.gralora import GraloraConfig
from .methods.hira import HiraConfig
from .methods.hra import HRAConfig
from .methods.ia3 import IA3Config
from .methods.lily import LilyConfig
from .methods.llama_adapter import AdaptionPromptConfig
from .methods.ln_tuning import LNTuningConfig
from .methods.loha import LoHaConfig
from .methods.lokr import LoKrConfig
from .methods.lora import LoraConfig
from .methods.lora_data import (
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
    replace_lora_weights_loftq,
)
from .methods.lora_init import CordaConfig, EvaConfig, LoraGAConfig
from .methods.loreft import LoReftConfig
from .methods.mam import MamConfig
from .methods.miss import MissConfig
from .methods.multitask_prompt_tuning import MultitaskPromptTuningConfig, MultitaskPromptTuningInit
from .methods.oft import OFTConfig
from .methods.p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
from .methods.peanut import PeanutConfig
from .methods.poly import PolyConfig
from .methods.prefix_tuning import PrefixTuningConfig
from .methods.prompt_tuning import PromptTuningConfig, PromptTuningInit
from .methods.psoft import PsoftConfig
from .methods.pvera import PveraConfig
from .methods.randlora import RandLoraConfig
from .methods.road import RoadConfig
from .methods.shira import ShiraConfig
from .methods.tinylora import TinyLoraConfig
from .methods.trainable_tokens import TrainableTokensConfig
from .methods.unilora import UniLoraConfig
from .methods.union import UnionConfig
from .methods.unipelt import UniPeltConfig
from .methods.vblora import VBLoRAConfig
from .methods.vera import VeraConfig
from .methods.waveft import WaveFTConfig
from .model import PeftModel, get_peft_model
from .targets import PartialTargetWarning
from .tokens import nearest_tokens
from .trainer import Trainer

__all__ = [
    "AdaLoraConfig",
    "Adapter",
    "AdapterError",
    "AdaptionPromptConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BeftConfig",
    "BitFitConfig",
    "BottleneckConfig",
    "C3AConfig",
    "CPTConfig",
    "CheckpointError",
    "CompacterConfig",
    "ConfigError",
    "CordaConfig",
    "DataError",
    "DeloraConfig",
    "EvaConfig",
    "FourierFTConfig",
    "FullConfig",
    "GloraConfig",
    "GraloraConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "InputAdapter",
    "LNTuningConfig",
    "LilyConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoReftConfig",
    "LoraConfig",
    "LoraGAConfig",
    "MamConfig",
    "MergeError",
    "MissConfig",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "OFTConfig",
    "PartialTargetWarning",
    "PeanutConfig",
    "PeftConfig",
    "PeftModel",
    "PolyConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "PsoftConfig",
    "PveraConfig",
    "QuantizedMergeWarning",
    "RandLoraConfig",
    "RecipeError",
    "RoadConfig",
    "ShiraConfig",
    "TargetError",
    "TaskType",
    "TinyLoraConfig",
    "TrainableTokensConfig",
    "Trainer",
    "TrainingError",
    "TrimtabError",
    "UniLoraConfig",
    "UniPeltConfig",
    "UnionConfig",
    "VBLoRAConfig",
    "VeraConfig",
    "WaveFTConfig",
    "get_peft_model",
    "initialize_lora_eva_weights",
    "nearest_tokens",
    "prepare_model_for_int8_training",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
]

__version__: str
