"""Load what a task starts from: a pretrained model, quantized or not, and its tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from .. import watch
from ..errors import ConfigError, did_you_mean

Quantization = Literal["none", "int8", "nf4"]


def load(
    auto: str, model: str, quantization: Quantization, head: dict[str, Any], pad: int | None, dtype: str = "auto"
) -> tuple[Any, list[str]]:
    """A model of one of transformers' Auto classes, and the names of its modules that are new and must be trained.

    Args:
        head: what its config is told, such as the classes. pad: the token that pads, where its config names none.
        dtype: of its weights; "auto" is what they were saved in.
    Raises:
        ConfigError: no such model.
    """
    import transformers

    with loading(model):
        config = transformers.AutoConfig.from_pretrained(model, **head)
    texts = config.get_text_config()
    if getattr(texts, "pad_token_id", None) is None:  # decoders find the last token of a row by it
        texts.pad_token_id = pad
    auto = getattr(transformers, auto)
    found, fresh = _load(auto, model, config, quantization, [], dtype)
    if fresh and quantization != "none":  # the new modules were quantized as well, but they are to be trained
        found, fresh = _load(auto, model, config, quantization, fresh, dtype)
    return found, fresh


def outline(auto: str, model: str, head: dict[str, Any]) -> Any:
    """What `load` gives, on the meta device. Raises: ConfigError."""
    import torch
    import transformers

    with loading(model), torch.device("meta"):
        return getattr(transformers, auto).from_config(transformers.AutoConfig.from_pretrained(model, **head))


def _load(
    auto: Any, model: str, config: Any, quantization: Quantization, plain: list[str], dtype: str
) -> tuple[Any, list[str]]:
    with loading(model), watch.busy("Loading the model"):
        found, report = auto.from_pretrained(
            model,
            config=config,
            dtype=dtype,
            quantization_config=_quantizer(quantization, plain),
            ignore_mismatched_sizes=True,  # the head of another set of classes is replaced by a new one
            output_loading_info=True,
        )
    missing = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    return found, _modules_of(found, missing)


def tokenizer(model: str) -> Any:
    """A model's tokenizer, able to pad. Raises: ConfigError."""
    from transformers import AutoTokenizer

    with loading(model):
        found = AutoTokenizer.from_pretrained(model)
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def longest(model: str, reader: Any) -> int:
    """The most tokens that both the model and its tokenizer can read."""
    from transformers import AutoConfig

    with loading(model):
        config = AutoConfig.from_pretrained(model).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return int(min(reader.model_max_length, positions or reader.model_max_length))


def _quantizer(quantization: Quantization, plain: list[str]) -> Any:
    """transformers' settings for bitsandbytes; `plain` are the modules to leave as they are."""
    if quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=plain or None)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=plain or None)


def _modules_of(model: Any, missing: set[str]) -> list[str]:
    """The outermost modules of which every parameter is missing, or else the layers that own one."""
    chosen: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{key}" for key, _ in module.named_parameters()}
        inside = any(name.startswith(f"{outer}.") for outer in chosen)
        lacks = (own and own <= missing) or any(f"{name}.{key}" in missing for key in module._parameters)
        if name and not inside and lacks:
            chosen.append(name)
    return chosen


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Turn what transformers raises about a model that is not there, or is none, into one line."""
    try:
        yield
    except ImportError as error:
        if "bitsandbytes" in str(error):
            raise ConfigError("Quantization needs bitsandbytes: pip install 'trimtab[quant]'.") from None
        raise ConfigError(f"The model {model} cannot be loaded: {_first_line(error)}") from None
    except (OSError, ValueError, KeyError) as error:
        folder = Path(model).expanduser()
        if folder.is_absolute() and not folder.is_dir():
            beside = [path.name for path in folder.parent.glob("*") if path.is_dir()]
            raise ConfigError(f"There is no model folder {model}.{did_you_mean(folder.name, beside)}") from None
        raise ConfigError(f"The model {model} cannot be loaded: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
