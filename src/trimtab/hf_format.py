"""HF PEFT's file format: which key of adapter_model.safetensors holds which parameter.

HF PEFT wraps: module `a.b` of the user's model is `base_model.model.a.b` there (`base_model.a.b` beside prompts:
`PeftConfig.hf_root`), and what lies inside an adapted module lies inside its `base_layer`. The rest of a key is the
method's (`Adapter.hf_key`).
"""

import contextlib
import copy
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from . import weights
from .adapter import Adapter, InputAdapter, PeftConfig, Union
from .errors import CheckpointError


def keys(adapters: Mapping[str, Adapter], config: PeftConfig) -> dict[tuple[str, str], str]:
    """(module name, entry of its adapter) -> HF PEFT's key. What adapters share has one key, so it is saved once.

    HF PEFT has no unions: of the methods in one the keys are theirs, behind the number of the method.
    """
    found: dict[tuple[str, str], str] = {}
    for number, method in enumerate(config.union_of()):
        own = {
            path: cast(Adapter, adapter.by_method[str(number)])
            for path, adapter in adapters.items()
            if isinstance(adapter, Union) and str(number) in adapter.by_method
        }
        for (path, entry), key in keys(own, method).items():
            found[path, f"by_method.{number}.{entry}"] = f"{number}.{key}"
    adapters = {path: adapter for path, adapter in adapters.items() if not isinstance(adapter, Union)}
    owner: dict[int, str] = {}  # of an adapter that several sites share, the first
    for path, adapter in adapters.items():
        before = _before(owner.setdefault(id(adapter), path), adapters, config)
        for name in adapter.state_dict():
            found[path, name] = adapter.hf_shared_key(name) or before + adapter.hf_key(name)
    return found


def computed_keys(adapters: Mapping[str, Adapter], config: PeftConfig) -> set[str]:
    """The keys of what HF PEFT's files hold beside, and nobody reads."""
    return {_before(path, adapters, config) + end for path, adapter in adapters.items() for end in adapter.hf_computed}


def _before(path: str, adapters: Mapping[str, Adapter], config: PeftConfig) -> str:
    """What stands before the method's own part of a key."""
    adapter = adapters[path]
    flat = isinstance(adapter, InputAdapter) and adapter.hf_flat
    return "" if flat else f"{config.hf_root}{_path(path, adapters)}."


def _path(path: str, adapters: Mapping[str, Adapter]) -> str:
    parts = path.split(".")
    written = []
    for depth, part in enumerate(parts, 1):
        written.append(part)
        outer = adapters.get(".".join(parts[:depth])) if depth < len(parts) else None
        written += ["base_layer"] * (outer.hf_wraps if outer is not None else 0)
    return ".".join(written)


def state(
    config: PeftConfig, adapters: Mapping[str, Adapter], values: Mapping[str, Tensor] | None, name: str
) -> dict[str, Tensor]:
    """The adapters' weights under HF PEFT's keys, taken from `values` (a state dict of the model) where given.

    Raises:
        CheckpointError: a weight that `values` lacks.
    """
    found: dict[str, Tensor] = {}
    stored: set[int] = set()
    for (path, entry), key in keys(adapters, config).items():
        if key in found:
            continue
        full = f"{path}.adapters.{name}.{entry}".removeprefix(".")
        if values is not None and full not in values:
            raise CheckpointError(f"state_dict lacks {full}. Give the state dict of the whole model.")
        tensor = adapters[path].state_dict()[entry] if values is None else values[full]
        whole = config.packed(path, entry, weights.whole(tensor)).detach().cpu().contiguous()
        found[key] = whole.clone() if whole.data_ptr() in stored else whole  # safetensors writes no storage twice
        stored.add(whole.data_ptr())
    for path, adapter in adapters.items():
        if adapter.hf_computed:
            own = {entry: found[key] for (_, entry), key in keys({path: adapter}, config).items()}
            copied = copy.deepcopy(adapter).cpu()
            copied.load_state_dict(own, assign=True)
            before = _before(path, adapters, config)
            found |= {before + end: value.detach().contiguous() for end, value in copied.computed().items()}
    return found


def embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """A transformers model's tables of its vocabulary, at the input and the output, by module name."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):
            found.append(getattr(model, getter)())
    return {name: module for name, module in model.named_modules() if any(module is table for table in found)}


def twins(key: str) -> list[str]:
    """The keys under which a trained copy's bias may lie as well: with bias="all" HF PEFT saves it twice.

    Inside a copy of several layers it leaves the adapter's name in the second key.
    """
    head, copied, rest = key.rpartition(".modules_to_save.")
    return [f"{head}.{rest}", f"{head}.{rest.partition('.')[2]}"] if copied else []


def shared_twins(key: str, adapters: Mapping[str, Adapter]) -> list[str]:
    """The keys of what adapters share, of which HF PEFT's RandLoRA saves another copy for every layer."""
    shared = {whole for adapter in adapters.values() for whole in adapter.hf_shared.values()}
    return [whole for whole in shared if key.rpartition(".")[2] == whole.rpartition(".")[2]]


def base_value(key: str, model: nn.Module, root: str) -> Tensor | None:
    """The base's own tensor that a key names: HF PEFT saves frozen ones too (`save_embedding_layers`, bias="all")."""
    plain = key.removeprefix(root).replace(".base_layer.", ".").replace(".original_module.", ".")
    path, _, entry = plain.rpartition(".")
    site: nn.Module | None = dict(model.named_modules()).get(path)
    if site is None:
        return None
    shape = weights.layout(site)
    if shape is not None and entry == shape.weight and weights.is_quantized(site):
        return None
    return site._parameters.get(entry)


def split(key: str, prefix: str, root: str) -> tuple[str, str]:
    """A key as (module name, end); the end begins at the part that starts with the method's own prefix.

    What is in the `base_layer` of the module, where one adapter is around another, keeps that in its end.
    """
    parts = key.removeprefix(root).split(".")
    own = [place for place, part in enumerate(parts) if prefix and part.startswith(prefix)]
    cut = own[-1] if own else len(parts) - 1
    while own and cut and parts[cut - 1] == "base_layer":
        cut -= 1
    return ".".join(part for part in parts[:cut] if part != "base_layer"), ".".join(parts[cut:])
