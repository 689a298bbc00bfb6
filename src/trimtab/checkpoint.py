"""Save and load adapters in HF PEFT's format: safe (no pickle), atomic, and complete or not at all."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import attach, files, hf_format, weights
from .adapter import Adapter
from .attach import trunk
from .errors import CheckpointError, ConfigError, TargetError
from .methods import PeftConfig
from .targets import PartialTargetWarning


def save(
    model: nn.Module, folder: str | Path, name: str, values: Mapping[str, Tensor] | None = None, write: bool = True
) -> None:
    """Write one adapter to `folder`. A crash leaves what was there before, or the new adapter, never a mixture.

    Args:
        values: the model's state dict, where the parameters themselves are sharded or stale.
        write: False on all processes but one. They only help to gather what is sharded.
    """
    own = trunk(model)
    attach.check_known(own, [name])
    if Path(folder).exists() and not Path(folder).is_dir():
        raise CheckpointError(f"{folder} is a file; an adapter is saved to a folder.")
    tensors = hf_format.state(own.configs[name], own.adapters(name), values, name)
    config = own.configs[name].to_save().model_copy(update={"inference_mode": True})
    if not write:
        return
    metadata = {"format": "pt", "base_model_class": type(model).__name__, "base_model_type": _model_type(model)}
    files.commit(
        Path(folder),
        {files.WEIGHTS: lambda path: save_file(tensors, path, metadata), files.CONFIG: config.write},
    )


def load(model: nn.Module, folder: str | Path, name: str, config: PeftConfig | None = None) -> None:
    """Attach the adapter saved in `folder` under this name; it does not act yet.

    Raises:
        AdapterError: the name is taken.
        CheckpointError: no adapter there, or one that does not fit this model. The model is untouched then.
    """
    attach.check_name(model, name)
    config, adapters = _read_adapters(model, folder, config or PeftConfig.from_pretrained(folder))
    attach.install(model, attach.Plan(name, config, adapters))


def hotswap(model: nn.Module, folder: str | Path, name: str) -> None:
    """`PeftModel.hotswap_adapter`, which says all of it."""
    own = trunk(model)
    attach.check_known(own, [name])
    config, adapters = _read_adapters(model, folder, PeftConfig.from_pretrained(folder))
    here, states = own.adapters(name), {}
    for path in here | adapters:
        try:
            if path not in here or path not in adapters:
                raise CheckpointError("one of the two only is there")
            states[path] = here[path].state_of(adapters[path])
        except CheckpointError as error:
            raise CheckpointError(
                f"The adapter in {folder} cannot take the place of {name!r}. At {path or type(model).__name__} {error}."
                " Nothing was changed. Load it beside with load_adapter."
            ) from None
    for path, adapter in here.items():
        adapter.load_state_dict(states[path])
    update = {setting: getattr(config, setting) for setting in config.found_in_training}
    own.configs[name] = own.configs[name].model_copy(update=update)


def _read_adapters(model: nn.Module, folder: str | Path, config: PeftConfig) -> tuple[PeftConfig, dict[str, Adapter]]:
    """The saved adapters, at no site yet, and their config."""
    where = _weights(folder)
    tensors = _read(where, model)
    config = _with_embeddings(config, tensors, model)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", PartialTargetWarning)  # a saved list may serve several architectures
            config, adapters = attach.build(model, config, saved=True)
    except (TargetError, ConfigError) as error:
        raise CheckpointError(f"The adapter in {folder} does not fit {type(model).__name__}: {error}") from None
    _fill(model, config, adapters, tensors, where)
    return config, adapters


def load_weights(model: nn.Module, folder: str | Path, name: str) -> None:
    """Read the weights saved in `folder` into an adapter that is attached already.

    Raises:
        AdapterError: no such adapter. CheckpointError: weights that are not those of this adapter.
    """
    own = trunk(model)
    attach.check_known(own, [name])
    where = _weights(folder)
    found = PeftConfig.from_pretrained(folder)
    config = own.configs[name]
    if type(found) is not type(config):
        raise CheckpointError(f"{folder} holds {found.peft_type}; the adapter {name!r} is {config.peft_type}.")
    update = {setting: getattr(found, setting) for setting in config.found_in_training}
    config = config.model_copy(update=update)
    _fill(model, config, own.adapters(name), _read(where, model), where)
    own.configs[name] = config


def _read(where: Path, model: nn.Module) -> dict[str, Tensor]:
    """All that is in the file, if it is of this model's architecture."""
    try:
        with safe_open(where, "pt") as opened:
            saved = (opened.metadata() or {}).get("base_model_type", "")
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise CheckpointError(f"{where} is damaged or no safetensors file: {error}.") from None
    here = _model_type(model)
    if saved and here and saved != here:
        raise CheckpointError(f"The adapter in {where.parent} was trained on a {saved} model; this is a {here} model.")
    return tensors


def _fill(
    model: nn.Module, config: PeftConfig, adapters: Mapping[str, Adapter], tensors: dict[str, Tensor], where: Path
) -> None:
    """Put what was read into this config's adapters, after checking that its keys and shapes are exactly theirs."""
    for adapter in adapters.values():
        adapter.expect(tensors)
    root = config.hf_root
    keys = hf_format.keys(adapters, config)
    computed = hf_format.computed_keys(adapters, config)
    missing = [key for key in keys.values() if key not in tensors]
    others = [key for key in tensors if key not in keys.values() and key not in computed]
    extra = [key for key in others if not _is_said_elsewhere(key, tensors, model, root, adapters)]
    wrong = []
    for (path, entry), key in keys.items():
        if key in tensors:
            here = adapters[path].state_dict()[entry]
            tensors[key] = config.unpacked(path, entry, tensors[key], here)
            a, b = tuple(tensors[key].shape), tuple(here.shape)
            wrong += [f"{key} is {a} in the file, {b} here"] if a != b else []
    problems = {"Missing": missing, "Unexpected": extra, "Of the wrong shape": wrong}
    if any(problems.values()):
        listed = "\n".join(f"{what}: {'; '.join(found)}" for what, found in problems.items() if found)
        raise CheckpointError(f"{where} does not fit this {type(model).__name__}. Nothing was changed.\n{listed}")
    modules = dict(model.named_modules())
    for path, adapter in adapters.items():
        own = {entry: key for (at, entry), key in keys.items() if at == path}
        state = adapter.state_dict()
        # A base on the meta device has no data yet; the adapter has, and keeps it on the CPU until it is moved.
        device = torch.device("cpu") if weights.device(modules[path]).type == "meta" else weights.device(modules[path])
        for entry, key in own.items():
            state[entry] = weights.shared_as(tensors[key].to(device, state[entry].dtype), state[entry])
        adapter.load_state_dict(state, assign=any(value.is_meta for value in adapter.state_dict().values()))


def _is_said_elsewhere(
    key: str, tensors: Mapping[str, Tensor], model: nn.Module, root: str, adapters: Mapping[str, Adapter]
) -> bool:
    """Whether HF PEFT saved this value beside the adapter's own ones, and it is what we have anyway."""
    tensor = tensors[key]
    possible = hf_format.twins(key) + hf_format.shared_twins(key, adapters)
    twins = [tensors[twin] for twin in possible if twin in tensors]
    own = twins[0] if twins else hf_format.base_value(key, model, root)
    if own is None or own.is_meta or own.shape != tensor.shape:
        return False
    return torch.equal(own.cpu(), tensor.to(own.dtype))


def _with_embeddings(config: PeftConfig, tensors: Mapping[str, Tensor], model: nn.Module) -> PeftConfig:
    """After the vocabulary was resized HF PEFT saves the embeddings whole, and does not say so in the config.

    They are trained copies here, as if modules_to_save had named them.
    """
    saved = getattr(config, "modules_to_save", []) or []
    found = [
        name
        for name, module in hf_format.embeddings(model).items()
        if (key := f"{config.hf_root}{name}.weight") in tensors
        and not any(name.endswith(entry) for entry in saved)
        and not _is_said_elsewhere(key, tensors, model, config.hf_root, {})
    ]
    return config.model_copy(update={"modules_to_save": [*saved, *found]}) if found else config


def _weights(folder: str | Path) -> Path:
    found = files.locate(folder)
    path = files.current(found, files.WEIGHTS)
    if path.is_file():
        return path
    if (found / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder} holds pickled weights (adapter_model.bin). Unpickling can run any code, so trimtab never does. "
            "Convert them with safetensors in an environment you trust."
        )
    raise CheckpointError(f"{folder} holds no adapter: there is no {files.WEIGHTS} in it.")


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


@dataclass(frozen=True)
class Description:
    """What lies in an adapter's folder, read without a model."""

    config: PeftConfig
    sites: dict[str, dict[str, tuple[int, ...]]]  # module name -> end of the key -> shape
    parameters: int
    bytes: int


def describe(folder: str | Path) -> Description:
    """Read an adapter's configuration and the shapes of its weights, not the weights."""
    config = PeftConfig.from_pretrained(folder)
    where = _weights(folder)
    sites: dict[str, dict[str, tuple[int, ...]]] = {}
    parameters = 0
    try:
        with safe_open(where, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                shape = tuple(opened.get_slice(key).get_shape())
                path, end = hf_format.split(key, config.hf_prefix, config.hf_root)
                sites.setdefault(path, {})[end] = shape
                parameters += int(torch.Size(shape).numel())
    except SafetensorError as error:
        raise CheckpointError(f"{where} is damaged or no safetensors file: {error}.") from None
    return Description(config, sites, parameters, where.stat().st_size)
