"""`AutoPeftModel`: base model and adapter from the adapter's folder alone."""

import importlib
from pathlib import Path
from typing import Any, ClassVar

from . import files
from .adapter import TaskType
from .errors import CheckpointError
from .methods import PeftConfig
from .model import PeftModel

AUTO = {  # transformers' classes for HF PEFT's tasks
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


class AutoPeftModel:
    """Load the base model that an adapter names, and the adapter onto it."""

    _auto_class: ClassVar[str | None] = None  # of transformers; None: that of the adapter's task, or else of its base

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        revision: str | None = None,
        subfolder: str = "",
        **base_settings: Any,
    ) -> PeftModel:
        """The base model with the adapter acting on it.

        Args:
            base_settings: go to the base model's own `from_pretrained` (dtype, device_map, num_labels, ...).
        Raises:
            CheckpointError: no adapter there, one that names no base model or one that cannot be loaded, or one that
                does not fit its base.
        """
        folder = files.locate(pretrained_model_name_or_path, revision, subfolder)
        config = PeftConfig.from_pretrained(folder)
        if not config.base_model_name_or_path:
            raise CheckpointError(f"{folder} does not name its base model. Load that, then PeftModel.from_pretrained.")
        if config.revision:
            base_settings = {"revision": config.revision, **base_settings}
        kind = cls._base_class(config, folder)
        try:
            base = kind.from_pretrained(config.base_model_name_or_path, **base_settings)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"The base model of {folder} cannot be loaded: {reason}") from error
        _fit_vocabulary(base, folder)
        return PeftModel.from_pretrained(base, folder, adapter_name, is_trainable)

    @classmethod
    def _base_class(cls, config: PeftConfig, folder: Path) -> Any:
        import transformers

        if auto := cls._auto_class or (AUTO[config.task_type] if config.task_type else None):
            return getattr(transformers, auto)
        mapping = config.auto_mapping or {}
        library, name = mapping.get("parent_library", ""), mapping.get("base_model_class", "")
        if not name:
            raise CheckpointError(
                f"{folder} tells neither its task nor its base's class. Use one of AutoPeftModelFor..."
            )
        # Importing what a downloaded file names would run any code, so only this library counts.
        if library.split(".")[0] != "transformers":
            raise CheckpointError(f"{folder} asks for {library}.{name}. Load it, then PeftModel.from_pretrained.")
        try:
            found = getattr(importlib.import_module(library), name, None)
        except ImportError:
            found = None
        if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
            raise CheckpointError(f"{folder} asks for {library}.{name}, which this version of transformers lacks.")
        return found


def _fit_vocabulary(base: Any, folder: Path) -> None:
    """Tokens added before training lie in the tokenizer beside the adapter: make room for them."""
    if not (folder / "tokenizer_config.json").exists() or not hasattr(base, "resize_token_embeddings"):
        return
    from transformers import AutoTokenizer

    tokens = len(AutoTokenizer.from_pretrained(folder))
    if tokens > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(tokens)


class AutoPeftModelForCausalLM(AutoPeftModel):
    _auto_class = AUTO[TaskType.CAUSAL_LM]


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    _auto_class = AUTO[TaskType.SEQ_2_SEQ_LM]


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    _auto_class = AUTO[TaskType.SEQ_CLS]


class AutoPeftModelForTokenClassification(AutoPeftModel):
    _auto_class = AUTO[TaskType.TOKEN_CLS]


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    _auto_class = AUTO[TaskType.QUESTION_ANS]


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    _auto_class = AUTO[TaskType.FEATURE_EXTRACTION]
