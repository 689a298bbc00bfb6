"""An input that is not kept for the backward pass, because the graph keeps anyway what it was made of.

A frozen linear layer keeps no input, so each input that an adapter keeps is memory on top. But most come from functions
of which PyTorch keeps what those got, for their own gradients. Such an input is made again in the backward pass:

    x = a b                        a norm's weight times what is normalised, and in Llama's MLP act(gate) times up
    x = gelu(a)
    x = (a - mean) / std w + b     a layer norm, of which mean and 1 / std are kept too

That is to the same bits, but for the layer norm, where the last one may differ.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Maker = Callable[[Sequence[Tensor]], Tensor]  # x, of its parts


def parts(x: Tensor) -> tuple[list[Tensor], Maker]:
    """Tensors, kept by the graph where x is made of such, and what makes x of them; else x itself.

    Hooks on what is kept (those of checkpoints, or of offloading) may let nobody look at it but the gradient's own
    function: with them it is x itself. So it is where somebody has written to x, whether or not the graph knows.
    """
    found: list[Tensor] = []
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    maker = None if hooked or x.grad_fn is None or x._version else _maker(x.grad_fn, found)
    return ([x], _first) if maker is None else (found, maker)


def _first(parts: Sequence[Tensor]) -> Tensor:
    return parts[0]


def _maker(node: Any, found: list[Tensor]) -> Maker | None:
    """What makes the result of a function of the graph of what that keeps, which is added to `found`."""
    kind = type(node).__name__
    if kind == "MulBackward0":
        return _product(node, found)
    if kind == "NativeLayerNormBackward0":
        return _norm(node, found)
    if kind == "GeluBackward0":
        form, a = node._saved_approximate, _part(node._saved_self, found)
        return lambda parts: F.gelu(a(parts), approximate=form)
    if kind == "ToCopyBackward0" and (inner := _maker(node.next_functions[0][0], found)) is not None:
        own, dtype = inner, node._input_metadata[0].dtype
        return lambda parts: own(parts).to(dtype)
    return None


def _product(node: Any, found: list[Tensor]) -> Maker | None:
    """A factor that is not kept, since the other one is frozen, may be made of what its own function keeps."""
    factors = [
        _maker(before, found) if own is None else _part(own, found)
        for own, (before, _) in zip((node._saved_self, node._saved_other), node.next_functions, strict=True)
    ]
    a, b = factors
    return None if a is None or b is None else lambda parts: a(parts) * b(parts)


def _norm(node: Any, found: list[Tensor]) -> Maker | None:
    dtype = node._saved_input.dtype
    mean, scale = node._saved_result1, node._saved_result2
    if scale.itemsize < 4:  # rounded more than the result was
        return None
    rest = [None if own is None else _part(own, found) for own in (node._saved_weight, node._saved_bias)]
    a, m, r = (_part(own, found) for own in (node._saved_input, mean, scale))

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
