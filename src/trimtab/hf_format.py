"""HF PEFT's file format: which key of adapter_model.safetensors holds which parameter.

HF PEFT wraps: module `a.b` of the user's model is `base_model.model.a.b` there, and what lies inside an adapted
module lies inside its `base_layer`. The rest of a key is the method's (`Adapter.hf_key`).
"""

from collections.abc import Mapping

from torch import Tensor, nn

from . import weights
from .adapter import Adapter

PREFIX = "base_model.model."


def keys(adapters: Mapping[str, Adapter]) -> dict[tuple[str, str], str]:
    """(module name, entry of its adapter) -> HF PEFT's key. What adapters share has one key, so it is saved once."""
    return {
        (path, name): adapter.hf_shared.get(name) or f"{PREFIX}{_path(path, adapters)}.{adapter.hf_key(name)}"
        for path, adapter in adapters.items()
        for name in adapter.state_dict()
    }


def _path(path: str, adapters: Mapping[str, Adapter]) -> str:
    parts = path.split(".")
    written = []
    for depth, part in enumerate(parts, 1):
        written.append(part)
        if depth < len(parts) and ".".join(parts[:depth]) in adapters:
            written.append("base_layer")
    return ".".join(written)


def state(adapters: Mapping[str, Adapter], values: Mapping[str, Tensor] | None, name: str) -> dict[str, Tensor]:
    """The adapters' weights under HF PEFT's keys, taken from `values` (a state dict of the model) where given."""
    found: dict[str, Tensor] = {}
    stored: set[int] = set()
    for (path, entry), key in keys(adapters).items():
        if key in found:
            continue
        full = f"{path}.adapters.{name}.{entry}"
        if values is not None and full in values:
            tensor = values[full]
        else:
            tensor = adapters[path].state_dict()[entry]
        gather = getattr(tensor, "full_tensor", None)  # sharded by FSDP2
        whole = (gather() if gather else tensor).detach().cpu().contiguous()
        found[key] = whole.clone() if whole.data_ptr() in stored else whole  # safetensors writes no storage twice
        stored.add(whole.data_ptr())
    return found


def base_value(key: str, model: nn.Module) -> Tensor | None:
    """The base's own tensor that a key names: HF PEFT saves frozen ones too (`save_embedding_layers`, bias="all")."""
    path, _, entry = key.removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")
    site: nn.Module | None = dict(model.named_modules()).get(path)
    if site is None:
        return None
    shape = weights.layout(site)
    if shape is not None and entry == shape.weight and weights.is_quantized(site):
        return None
    return site._parameters.get(entry)


def split(key: str, prefix: str) -> tuple[str, str]:
    """A key as (module name, end); the end begins at the part that starts with the method's own prefix."""
    parts = key.removeprefix(PREFIX).replace(".base_layer.", ".").split(".")
    own = [place for place, part in enumerate(parts) if prefix and part.startswith(prefix)]
    cut = own[-1] if own else len(parts) - 1
    return ".".join(parts[:cut]), ".".join(parts[cut:])
