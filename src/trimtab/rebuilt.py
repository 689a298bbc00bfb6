"""An input that is not kept for the backward pass, because the graph keeps anyway what it was made of.

A frozen linear layer keeps no input, so each input that an adapter keeps is memory on top. But many are products, of
which PyTorch keeps the factors for their own gradients: a norm's weight times what is normalised, and in Llama's MLP
act(gate) times up. Such an input is made again in the backward pass, to the same bits, by a multiplication.

    x = w * to(h * r)    made of    w, h, r
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Recipe = int | tuple[str, Any, Any]  # the number of a part, or "mul" of two recipes, or "to" of one and a dtype


def parts(x: Tensor) -> tuple[list[Tensor], Recipe]:
    """Tensors, kept by the graph where x is made of such, and how x is made of them; else x itself.

    Hooks on what is kept (those of checkpoints, or of offloading) may let nobody look at it but the gradient's own
    function: with them it is x itself.
    """
    found: list[Tensor] = []
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    recipe = _recipe(x.grad_fn, found) if hooks is None else None
    return ([x], 0) if recipe is None else (found, recipe)


def made(recipe: Recipe, parts: Sequence[Tensor]) -> Tensor:
    """x, of its parts."""
    if isinstance(recipe, int):
        return parts[recipe]
    kind, first, second = recipe
    return made(first, parts).to(second) if kind == "to" else made(first, parts) * made(second, parts)


def _recipe(node: Any, found: list[Tensor]) -> Recipe | None:
    """How the result of a function of the graph is made of what it keeps, which is added to `found`."""
    kind = type(node).__name__
    if kind == "ToCopyBackward0":
        inner = _recipe(node.next_functions[0][0], found)
        return None if inner is None else ("to", inner, node._input_metadata[0].dtype)
    if kind != "MulBackward0":
        return None
    factors: list[Recipe] = []
    for own, (before, _) in zip((node._saved_self, node._saved_other), node.next_functions, strict=True):
        if own is not None:
            found.append(own)
            factors.append(len(found) - 1)
        elif (inner := _recipe(before, found)) is not None:
            factors.append(inner)
        else:
            return None
    return "mul", factors[0], factors[1]
