"""trimtab: parameter-efficient fine-tuning of pretrained PyTorch models. The small surface that turns the ship."""

from typing import TYPE_CHECKING, Any

from .adapter import Adapter, InputAdapter, PeftConfig, TaskType
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
from .methods.adalora import AdaLoraConfig
from .methods.bitfit import BitFitConfig
from .methods.boft import BOFTConfig
from .methods.bottleneck import BottleneckConfig
from .methods.compacter import CompacterConfig
from .methods.cpt import CPTConfig
from .methods.hra import HRAConfig
from .methods.ia3 import IA3Config
from .methods.llama_adapter import AdaptionPromptConfig
from .methods.ln_tuning import LNTuningConfig
from .methods.loha import LoHaConfig
from .methods.lokr import LoKrConfig
from .methods.lora import LoraConfig
from .methods.loreft import LoReftConfig
from .methods.mam import MamConfig
from .methods.multitask_prompt_tuning import MultitaskPromptTuningConfig, MultitaskPromptTuningInit
from .methods.oft import OFTConfig
from .methods.p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
from .methods.prefix_tuning import PrefixTuningConfig
from .methods.prompt_tuning import PromptTuningConfig, PromptTuningInit
from .methods.trainable_tokens import TrainableTokensConfig
from .methods.union import UnionConfig
from .methods.unipelt import UniPeltConfig
from .methods.vera import VeraConfig
from .model import PeftModel, get_peft_model
from .targets import PartialTargetWarning
from .tokens import nearest_tokens

if TYPE_CHECKING:
    from .trainer import Trainer

__version__ = "0.1.0"

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
    "BitFitConfig",
    "BottleneckConfig",
    "CPTConfig",
    "CheckpointError",
    "CompacterConfig",
    "ConfigError",
    "DataError",
    "HRAConfig",
    "IA3Config",
    "InputAdapter",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoReftConfig",
    "LoraConfig",
    "MamConfig",
    "MergeError",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "OFTConfig",
    "PartialTargetWarning",
    "PeftConfig",
    "PeftModel",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "QuantizedMergeWarning",
    "RecipeError",
    "TargetError",
    "TaskType",
    "TrainableTokensConfig",
    "Trainer",
    "TrainingError",
    "TrimtabError",
    "UniPeltConfig",
    "UnionConfig",
    "VeraConfig",
    "get_peft_model",
    "nearest_tokens",
    "prepare_model_for_int8_training",
    "prepare_model_for_kbit_training",
]


def __getattr__(name: str) -> Any:
    if name == "Trainer":  # its base class is transformers', which takes seconds to import
        from .trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
