"""What a layer's weight is: its shape, its reading and writing (quantized or not), and the map it stands for.

Everywhere else a weight is (out, in, *kernel) in floating point. Here, and only here, live the layers that
store it otherwise: transposed (Embedding, GPT-2's Conv1D), under another name (MultiheadAttention) or packed
(bitsandbytes, torchao).
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ConfigError, MergeError

ModuleT = TypeVar("ModuleT", bound=nn.Module)

MOST = 2**47  # numbers in a parameter, hundreds of terabytes
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Layout:
    """Shape of a layer's weight, (out, in / groups, *kernel), and how the layer stores it."""

    out: int
    into: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    weight: str = "weight"
    bias: str = "bias"


def layout(module: nn.Module) -> Layout | None:
    """How this layer stores its weight, or None where it is no layer with one linear map."""
    if isinstance(module, nn.Embedding):
        return Layout(module.embedding_dim, module.num_embeddings, transposed=True)
    if isinstance(module, CONVOLUTIONS):
        return Layout(module.out_channels, module.in_channels, tuple(module.kernel_size), module.groups)
    if isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim:  # separate q, k, v weights of different widths
            return None
        return Layout(3 * module.embed_dim, module.embed_dim, weight="in_proj_weight", bias="in_proj_bias")
    if is_gpt2_conv1d(module):
        return Layout(module.nf, module.nx, transposed=True)  # type: ignore[arg-type]
    # nn.Linear and the many quantized layers that look like it without deriving from it
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int) and not isinstance(module, nn.Bilinear):
        return Layout(sizes[0], sizes[1])
    return None


def is_gpt2_conv1d(module: nn.Module) -> bool:
    return any(base.__name__ == "Conv1D" for base in type(module).__mro__) and hasattr(module, "nf")


def parameter(module: nn.Module) -> Tensor | None:
    """The stored weight as it lies there, for its device and dtype only."""
    shape = layout(module)
    found = module._parameters.get(shape.weight) if shape else None
    return found if found is not None else next(module.parameters(), None)


def new_parameter(module: nn.Module, *shape: int) -> nn.Parameter:
    """An uninitialised parameter for an adapter of this layer: in training precision, beside the layer's weight.

    Inside `torch.device("meta")` it lies there: that is how a plan is made that will be filled from a file.

    Raises:
        ConfigError: no memory holds it.
    """
    if math.prod(shape) >= MOST:
        raise ConfigError(f"An adapter would have a parameter of {' x '.join(map(str, shape))}: no memory holds it.")
    default = torch.get_default_device()
    place = default if default.type == "meta" else device(module)
    return nn.Parameter(torch.empty(shape, dtype=master_dtype(compute_dtype(module)), device=place))


def device(module: nn.Module) -> torch.device:
    """Where the layer computes; one that accelerate offloads keeps its weight on the meta device between calls."""
    stored = parameter(module)
    if stored is None:
        return torch.get_default_device()
    hook: Any = getattr(module, "_hf_hook", None)
    places = [getattr(part, "execution_device", None) for part in getattr(hook, "hooks", [hook])]
    place = next((found for found in places if found is not None), None)
    return stored.device if place is None or not stored.is_meta else torch.device(place)


def beside(module: nn.Module, shared: ModuleT) -> ModuleT:
    """What adapters share, on the device of one of their layers, unless that has no values yet."""
    place = device(module)
    return shared if place.type == "meta" else shared.to(place)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate (`device_map`) fetches the weight from the CPU or the disk at each call."""
    stored = parameter(module)
    return stored is not None and stored.is_meta and hasattr(module, "_hf_hook")


def whole(value: Tensor) -> Tensor:
    """A tensor of which each process may hold a part; then all of them must ask for it."""
    gathered: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return gathered


def shared_as(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, of which each process keeps the part that it has of the other."""
    if not hasattr(other, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(value, other.device_mesh, other.placements)


def is_sharded(module: nn.Module) -> bool:
    """Whether each process holds a part of some weight (FSDP2's `fully_shard`, tensor parallelism)."""
    return any(hasattr(stored, "full_tensor") for stored in module.parameters())


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The floating-point type the layer works in; float32 where a packed weight does not tell."""
    stored = parameter(module)
    return stored.dtype if stored is not None and stored.is_floating_point() else torch.float32


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which adapters are trained on a base of this one: never below float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def read(module: nn.Module) -> Tensor:
    """The dense weight (out, in / groups, *kernel), or a norm's; a view of the stored one where that is dense.

    Raises:
        MergeError: a packed format that this library cannot read.
    """
    shape = layout(module)
    weight = module._parameters.get(shape.weight if shape else "weight")
    if weight is None:
        raise MergeError(f"The weight of {type(module).__name__} cannot be read: it is stored in an unknown format.")
    check_whole(module)
    kind, dense = type(weight), cast(Tensor, weight)
    if kind in (nn.Parameter, Tensor):
        pass  # first: torch.compile cannot look at their module's name
    elif kind.__name__ == "Params4bit":
        dense = _read_4bit(weight)
    elif kind.__name__ == "Int8Params":
        dense = _read_8bit(module, weight)
    elif kind.__module__.startswith("torchao"):
        dense = weight.dequantize()
    return dense.T if shape and shape.transposed else dense


def check_whole(module: nn.Module) -> None:
    """Raise a MergeError where a weight is not all here."""
    if is_sharded(module):
        raise MergeError(f"The weight of {type(module).__name__} is sharded. Save the adapter and merge it unsharded.")
    if is_offloaded(module):
        raise MergeError(f"The weight of {type(module).__name__} is offloaded. Load the model whole to merge into it.")


def write(module: nn.Module, weight: Tensor) -> None:
    """Give the module a new weight (out, in / groups, *kernel) in the format of its present one.

    The old parameter object is replaced, not written into, so that whoever kept it can put it back.
    """
    shape = layout(module)
    assert shape is not None
    old = module._parameters[shape.weight]
    assert old is not None
    if type(old).__name__ == "Params4bit":
        new = _like_4bit(old, weight)
    elif type(old).__name__ == "Int8Params":
        new = _like_8bit(module, old, weight)
    elif is_quantized(module):
        raise MergeError(f"A weight of type {type(old).__name__} cannot be written. Keep the adapter attached instead.")
    else:
        stored = weight.T if shape.transposed else weight
        new = nn.Parameter(stored.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    module._parameters[shape.weight] = new


def shared_state(module: Any) -> Any:
    """What an 8-bit layer has beside its parameters, and others around the same weight must have too; else None."""
    weight = module._parameters.get("weight")
    if type(weight).__name__ != "Int8Params":
        return None
    if weight.CB is not None:  # it moves from the weight to the layer at the first call
        module.init_8bit_state()
    return module.state


def is_quantized(module: nn.Module) -> bool:
    shape = layout(module)
    weight = module._parameters.get(shape.weight) if shape else None
    if shape is None or weight is None:
        return shape is not None
    return type(weight).__name__ in ("Params4bit", "Int8Params") or type(weight).__module__.startswith("torchao")


def linear(site: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The site's own map with another weight (n, in, *kernel) in place of its own, and no bias.

    For linear layers x (..., in) -> (..., n), for embeddings ids (...) -> (..., n), for convolutions
    (B, in, ...) -> (B, n, ...), batched or not, with the site's stride, padding and dilation. A weight
    (n, in / groups, *kernel) is grouped as the site's own is; with (n, in, *kernel) the n rows see all inputs.
    """
    if isinstance(site, nn.Embedding):
        found = F.embedding(x, weight.T, site.padding_idx)
        return found * getattr(site, "embed_scale", 1.0)  # Gemma scales what it looks up
    if isinstance(site, CONVOLUTIONS):
        return _convolve(site, x, weight)
    return F.linear(x, weight)


def _convolve(site: Any, x: Tensor, weight: Tensor) -> Tensor:
    padding = site.padding
    if site.padding_mode != "zeros":
        x, padding = F.pad(x, site._reversed_padding_repeated_twice, mode=site.padding_mode), 0
    groups = site.in_channels // weight.shape[1]
    convolve = _CONVOLVE[len(site.kernel_size)]
    result: Tensor = convolve(x, weight, None, site.stride, padding, site.dilation, groups)
    return result


def mix(site: nn.Module, h: Tensor, weight: Tensor) -> Tensor:
    """A map of features at each position: h (..., n) -> (..., out), or (B, n, ...) -> (B, out, ...) on convolutions.

    With a grouped convolution, weight is (out, n / groups): each group of outputs sees its share of the n.
    """
    if not isinstance(site, CONVOLUTIONS):
        return F.linear(h, weight)
    dimensions = len(site.kernel_size)
    result: Tensor = _CONVOLVE[dimensions](h, weight[(...,) + (None,) * dimensions], groups=site.groups)
    return result


# bitsandbytes is imported only where one of its parameters has been met, so it is there.


def stop_repacking(module: nn.Module) -> bool:
    """Keep a layer's 4-bit weight in the packing that gradients pass; whether that had to be asked for.

    On processors with AVX512-BF16 bitsandbytes packs it another way at the first evaluation, and from then on a
    backward pass fails, or where the layer has no bias leaves gradients out without a word.
    """
    if not vars(module).get(REPACKS):
        return False
    setattr(module, REPACKS, False)
    weight: Any = module._parameters["weight"]
    weight.data, weight.quant_state = _packed_for_all(weight)
    return True


def allow_repacking(module: nn.Module) -> None:
    setattr(module, REPACKS, True)


REPACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' name


def _packed_for_all(weight: Any) -> tuple[Tensor, Any]:
    data, state = weight.data, weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return data, state
    from bitsandbytes.nn.modules import _convert_weight_packed_for_cpu_inverse as unpack

    state = copy.copy(state)  # `unpack` writes to it
    state.original_nested = False  # the scales are plain by now, and compressing them again would round them
    data, state = unpack(data, state)
    state.absmax = state.absmax.T.flatten().float()  # which `unpack` leaves as they were
    return data, state


def _read_4bit(weight: Any) -> Tensor:
    import bitsandbytes.functional as bnb

    dense: Tensor = bnb.dequantize_4bit(*_packed_for_all(weight))
    return dense


def _like_4bit(old: Any, weight: Tensor) -> nn.Parameter:
    from bitsandbytes.nn import Params4bit

    state = old.quant_state
    new = Params4bit(
        weight.to(state.dtype).contiguous(),
        requires_grad=False,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
    )
    quantized: nn.Parameter = new.to(old.device)
    return quantized


def _read_8bit(module: Any, weight: Any) -> Tensor:
    import bitsandbytes.functional as bnb

    scale = module.state.SCB if module.state.SCB is not None else weight.SCB  # moves at the first forward pass
    dense: Tensor = bnb.int8_vectorwise_dequant(weight.data, scale)
    return dense


def _like_8bit(module: Any, old: Any, weight: Tensor) -> nn.Parameter:
    from bitsandbytes import MatmulLtState
    from bitsandbytes.nn import Int8Params

    state = MatmulLtState()
    state.threshold, state.has_fp16_weights = module.state.threshold, module.state.has_fp16_weights
    state.use_pool = module.state.use_pool
    module.state = state
    new = Int8Params(weight.to(torch.float16).contiguous().cpu(), requires_grad=False, has_fp16_weights=False)
    quantized: nn.Parameter = new.to(old.device)
    return quantized
