"""Random numbers of several jobs: each has its own, also those that the base draws for its rows of a common batch."""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .errors import ConfigError
from .rows import Group, Rows

State = tuple[Tensor, list[Tensor] | None]  # of PyTorch's generators: the processor's and the graphics cards'
DROPPED = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
LAYERS_LEFT_OUT = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")  # for all rows at once
UNKNOWN = (nn.MultiheadAttention, nn.RNNBase, nn.AlphaDropout, nn.FeatureAlphaDropout)
MASKING = ("apply_spec_augment",)


@dataclass
class Randomness:
    """What random numbers of a job are drawn from next, and where its accumulation of gradients is (accelerate's)."""

    tensors: State
    numpy: Any
    python: Any
    gradients: dict[str, Any]

    @classmethod
    def now(cls) -> "Randomness":
        gradients = dict(GradientState._shared_state)
        return cls(_tensors(), np.random.get_state(), random.getstate(), gradients)

    def go_on(self) -> None:
        _draw_from(self.tensors)
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self.gradients)

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Random tensors inside the block are this job's."""
        before = _tensors()
        _draw_from(self.tensors)
        try:
            yield
        finally:
            self.tensors = _tensors()
            _draw_from(before)


def _tensors() -> State:
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), cards


def _draw_from(state: State) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])


def draws(model: nn.Module) -> bool:
    """Whether the model draws random numbers in training."""
    config = getattr(model, "config", None)
    settings = config.to_dict() if config is not None else {}
    flat = {name: value for name, value in settings.items() if "drop" in name}
    return (
        any(isinstance(value, float) and value > 0 for value in flat.values())
        or any(name in settings for name in LAYERS_LEFT_OUT)
        or any(isinstance(part, DROPPED) and part.p > 0 for part in model.modules())
    )


def refuse_unknown(model: nn.Module) -> None:
    """Raise a ConfigError where the model draws in a way that this module does not take apart by rows."""
    config = getattr(model, "config", None)
    for setting in (*LAYERS_LEFT_OUT, *MASKING):
        if getattr(config, setting, None):
            raise ConfigError(f"{type(model).__name__} has {setting}={getattr(config, setting)}, which is drawn for a "
                              "batch as a whole, so jobs cannot share one. Train them one by one.")  # fmt: skip
    for name, part in model.named_modules():
        if isinstance(part, UNKNOWN) and (vars(part).get("dropout") or vars(part).get("p")):
            raise ConfigError(f"{name} ({type(part).__name__}) has dropout of a kind that cannot be drawn for each job "
                              "by itself. Train the jobs one by one.")  # fmt: skip


class OwnDraws(TorchFunctionMode):
    """Inside the block dropout and random tensors are drawn job by job."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        self.groups = list(rows.groups.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RANDOM and not self.rows.turning:  # in a job's turn an adapter draws for itself
            return RANDOM[func](self, func, *args, **kwargs)
        return func(*args, **kwargs)

    def each(self, draw: Callable[[Group], Tensor]) -> list[Tensor]:
        found = []
        for group in self.groups:
            with self.rows.turn(group):
                found.append(draw(group))
        return found

    def dropout(self, func: Any, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        rows, whole, batch = self.rows, self.rows.length, len(self.rows.names)
        if not training or p == 0:
            return x
        if x.dim() == 2 and len(x) != batch and len(x) // batch in rows.tokens:
            apart = x.view(batch, -1, x.shape[1])
            return self.dropout(func, apart, p).flatten(0, 1)
        if x.dim() == 4 and whole is not None:  # the probabilities of attention

            def own(group: Group) -> Tensor:
                short = x[group.span, :, : group.length, : group.length]
                more = whole - (group.length or 0)
                return F.pad(func(short, p), (0, more, 0, more))

            return torch.cat(self.each(own))
        dropped: Tensor = rows.joined(self.groups, self.each(lambda group: func(rows.of(group, x), p)))
        return dropped

    def attention(self, func: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        settings = {**dict(zip(names, args, strict=False)), **kwargs}
        if not settings.get("dropout_p") or len(query) != len(self.rows.names):
            return func(query, key, value, **settings)  # type: ignore[no-any-return]
        whole, mask = self.rows.length, settings.pop("attn_mask", None)

        def own(group: Group) -> Tensor:
            def short(tensor: Tensor, *dimensions: int) -> Tensor:
                found = tensor[group.span] if len(tensor) == len(self.rows.names) else tensor
                for dimension in dimensions:
                    if whole is not None and found.shape[dimension] == whole:
                        found = found.narrow(dimension, 0, group.length or whole)
                return found

            masked = None if mask is None else short(mask, -1, -2)
            parts = [short(tensor, 2) for tensor in (query, key, value)]
            found: Tensor = func(*parts, attn_mask=masked, **settings)
            return F.pad(found, (0, 0, 0, query.shape[2] - found.shape[2]))

        return torch.cat(self.each(own))

    def rand(self, func: Any, *size: Any, **kwargs: Any) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        if shape and shape[0] == len(self.rows.names):
            return torch.cat(self.each(lambda group: func((len(group.rows), *shape[1:]), **kwargs)))
        return self.each(lambda _: func(shape, **kwargs))[-1]  # not of rows: so many are drawn for each job, too


RANDOM: dict[Any, Callable[..., Any]] = {
    F.dropout: OwnDraws.dropout,
    torch.dropout: OwnDraws.dropout,
    F.scaled_dot_product_attention: OwnDraws.attention,
    torch.rand: OwnDraws.rand,
}
