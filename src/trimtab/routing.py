"""Rows of one batch to different adapters: what a model gains for it.

model(**batch, adapter_names=["a", "b", "__base__"])    model.generate(**batch, adapter_names=[...])

with model.route(["a", "b", "__base__"]):
    ...
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .attach import Trunk, check_known, check_unmerged, trunk
from .errors import AdapterError
from .rows import BASE, Rows
from .sites import Active
from .swap import Swapped


class Routed(Swapped, nn.Module):
    """Mixed into a model with adapters: `forward` and `generate` take the name of an adapter for each row."""

    order: ClassVar[int] = 1

    @classmethod
    def namespace(cls, original: type[nn.Module]) -> dict[str, Any]:
        own = getattr(original, "generate", None)
        if own is None:
            return {}

        @functools.wraps(own)
        def generate(model: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
            kind = {"generating": True, "fixed": True}
            with contextlib.nullcontext() if adapter_names is None else _routed(trunk(model), adapter_names, **kind):
                return own(model, *args, **kwargs)

        return {"generate": generate}

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if adapter_names is None else _routed(trunk(self), adapter_names, fixed=True):
            active = trunk(self).active
            if active.rows is None:
                return super().forward(*args, **kwargs)
            values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 1]
            rows = active.rows.repeated(_times(active.rows, values))
            rows.tokens, rows.filled = {value.shape[1] for value in values}, False
            with acting(active, rows, self):
                return super().forward(*args, **kwargs)

    @contextlib.contextmanager
    def route(self, adapter_names: Sequence[str]) -> Iterator[None]:
        """Inside the `with` block each row of a batch is under the adapter of its name, "__base__" meaning none.

        In training as in evaluation: gradients of a row go to its adapter, if `set_requires_grad` lets that learn.
        Without gradients LoRA's weights are stacked once for the block, and again after a pass with gradients or where
        PyTorch knows of a change: a write to `parameter.data` is not seen. Layers that are checkpointed by
        `gradient_checkpointing_enable` remember their rows; where torch.utils.checkpoint is called otherwise, keep the
        backward pass in the block.

        Raises:
            AdapterError: an unknown name, merged adapters, or (when the model is called) another number of rows, or a
                module with an adapter at which rows cannot be told from each other.
        """
        with _routed(trunk(self), adapter_names):
            yield

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters learn, or not, whether or not they act: for training several in mixed batches."""
        own = trunk(self)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_known(own, names)
        for name in names:
            for adapter in own.adapters(name).values():
                adapter.requires_grad_(requires_grad)


@contextlib.contextmanager
def _routed(own: Trunk, names: Sequence[str], **kind: Any) -> Iterator[None]:
    check_unmerged(own)
    if isinstance(names, str) or not names:
        raise AdapterError(f"adapter_names={names!r}: give a list of names, one for each row of the batch.")
    check_known(own, [name for name in names if name != BASE])
    before = own.active.rows
    own.active.rows = Rows(names, **kind)
    try:
        yield
    finally:
        own.active.rows = before


def _times(rows: Rows, values: Sequence[Tensor]) -> int:
    """How often each of the rows is in a batch, which is once, except in `generate`."""
    sizes, named = [len(value) for value in values], len(rows.names)
    if not sizes or named in sizes:
        return 1
    if rows.generating and max(sizes) % named == 0:
        return max(sizes) // named
    raise AdapterError(f"adapter_names has {named} names, and the batch {max(sizes)} rows. Give a name for each row.")


@contextlib.contextmanager
def acting(active: Active, rows: Rows, model: nn.Module) -> Iterator[None]:
    """These rows inside the block, and when layers are computed again in the backward pass."""
    before = active.rows
    active.rows = rows
    layers = [part for part in model.modules() if vars(part).get("gradient_checkpointing")] if _learning(model) else []
    own = {layer: layer._gradient_checkpointing_func for layer in layers}
    for layer, checkpoint in own.items():
        layer._gradient_checkpointing_func = _remembering(checkpoint, active, rows)  # type: ignore[assignment, arg-type]
    try:
        yield
    finally:
        active.rows = before
        for layer, checkpoint in own.items():
            layer._gradient_checkpointing_func = checkpoint


def _learning(model: nn.Module) -> bool:
    return model.training and torch.is_grad_enabled()


def _remembering(checkpoint: Callable[..., Any], active: Active, rows: Rows) -> Callable[..., Any]:
    def remembering(function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        begun, first = rows.begin(), True

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal first
            around, first = contextlib.nullcontext() if first else rows.again(begun), False
            before, active.rows = active.rows, rows
            try:
                with around:
                    return function(*args, **kwargs)
            finally:
                active.rows = before

        return checkpoint(run, *args, **settings)

    return remembering
