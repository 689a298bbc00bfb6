"""An input that is not kept for the backward pass, because the graph keeps anyway what it was made of.

A frozen linear layer keeps no input, so each input that an adapter keeps is memory on top. But most come from functions
of which PyTorch keeps what those got, for their own gradients. Such an input is made again in the backward pass:

    x = a b                        a norm's weight times what is normalised, and in Llama's MLP act(gate) times up
    x = gelu(a)
    x = (a - mean) / std w + b     a layer norm, of which mean and 1 / std are kept too

That is to the same bits, but for the layer norm, where the last one may differ. What is not seen: a write that PyTorch
does not see either (`x.data`), and one without gradients to a factor, before the product.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Maker = Callable[[Sequence[Tensor]], Tensor]  # x, of its parts
HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # a PyTorch without it keeps inputs


def parts(x: Tensor) -> tuple[list[Tensor], Maker]:
    """Tensors, kept by the graph where x is made of such, and what makes x of them; else x itself.

    It is x itself where hooks act on what is kept (those of checkpoints, or of offloading), which may let nobody look
    but the gradient's own function; where somebody has written to x; and where a part is not there for good, as a
    parameter outside the unit that FSDP has gathered.
    """
    found: list[Tensor] = []
    if HOOKS is None or HOOKS(True) is not None or x.grad_fn is None or x._version:
        return [x], _first
    try:
        maker = _maker(x.grad_fn, found)
    except RuntimeError:  # the graph is freed, or a part was written to: gradients of x are out of reach, not others
        maker = None
    if maker is None or not all(part.untyped_storage().nbytes() for part in found):
        return [x], _first
    return found, maker


def _first(parts: Sequence[Tensor]) -> Tensor:
    return parts[0]


def _maker(node: Any, found: list[Tensor]) -> Maker | None:
    """What makes the result of a function of the graph of what that keeps, which is added to `found`."""
    kind = type(node).__name__
    if kind == "ToCopyBackward0" and (inner := _maker(node.next_functions[0][0], found)) is not None:
        own, to = inner, node._input_metadata[0]
        return lambda parts: own(parts).to(to.device, to.dtype)
    if kind not in KEPT or any(map(_hooked, (getattr(node, f"_raw_saved_{name}") for name in KEPT[kind]))):
        return None
    kept = [getattr(node, f"_saved_{name}") for name in KEPT[kind]]
    if kind == "MulBackward0":
        return _product(node, kept, found)
    if kind == "NativeLayerNormBackward0":
        return _norm(kept, found)
    form, a = node._saved_approximate, _part(kept[0], found)
    return lambda parts: F.gelu(a(parts), approximate=form)


def _hooked(saved: Any) -> bool:
    """Whether a hook acts on it, as far as this PyTorch tells."""
    return getattr(saved, "unpack_hook", _hooked) is not None


KEPT = {  # the functions that are known, and the names of what they keep
    "GeluBackward0": ("self",),
    "MulBackward0": ("self", "other"),
    "NativeLayerNormBackward0": ("input", "result1", "result2", "weight", "bias"),
}


def _product(node: Any, kept: Sequence[Tensor | None], found: list[Tensor]) -> Maker | None:
    """A factor that is not kept, since the other one is frozen, may be made of what its own function keeps."""
    factors = [
        _maker(before, found) if own is None else _part(own, found)
        for own, (before, _) in zip(kept, node.next_functions, strict=True)
    ]
    a, b = factors
    return None if a is None or b is None else lambda parts: a(parts) * b(parts)


def _norm(kept: Sequence[Any], found: list[Tensor]) -> Maker | None:
    if kept[2].itemsize < 4:  # rounded more than the result was
        return None
    dtype = kept[0].dtype
    a, m, r = (_part(own, found) for own in kept[:3])
    rest = [None if own is None else _part(own, found) for own in kept[3:]]

    def make(parts: Sequence[Tensor]) -> Tensor:
        x = (a(parts) - m(parts)).mul_(r(parts))
        w, b = (None if own is None else own(parts) for own in rest)
        x = x if w is None else x.mul_(w)
        return (x if b is None else x.add_(b)).to(dtype)

    return make


def _part(tensor: Tensor, found: list[Tensor]) -> Maker:
    number = len(found)
    found.append(tensor)
    return lambda parts: parts[number]
