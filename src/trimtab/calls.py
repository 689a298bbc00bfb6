"""Calls of one part of a base by several jobs, as one call (lockstep.py)."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Arguments whose second dimension is the length of the rows, and which mask says what of them is padding.
MASKED = {
    "input_ids": "attention_mask",
    "inputs_embeds": "attention_mask",
    "encoder_hidden_states": "encoder_attention_mask",
}
LONG = (*MASKED, *MASKED.values(), "token_type_ids", "position_ids")
UNUSED = "num_items_in_batch"  # of use to the loss, which each job has for itself


@dataclass(eq=False)
class Call:
    """A job waits for the result of a part of the base."""

    part: str
    given: dict[str, Any]
    device: str
    autocast: torch.dtype | None
    flat: bool  # whether the part is a linear layer, which takes each position by itself

    @property
    def size(self) -> int:
        """The number of rows."""
        return max(
            (len(value) for value in self.given.values() if isinstance(value, Tensor) and value.dim()), default=0
        )

    @property
    def length(self) -> int:
        """The length of the rows, 0 where they have none that is known."""
        return next((self.given[name].shape[1] for name in MASKED if self.given.get(name) is not None), 0)

    def form(self) -> Hashable:
        """Equal for calls that can be put into one batch; None where there is no such other."""
        found: list[Any] = [self.part, self.autocast]
        # Where encoder and decoder are one part, one length does not say which tensors are to be cut to it.
        both = any(name.startswith("decoder_") and value is not None for name, value in self.given.items())
        for name, value in self.given.items():
            if isinstance(value, Tensor):
                if value.dim() < 2:
                    return None
                shape = value.shape[-1:] if self.flat else value.shape[2 if name in LONG and not both else 1 :]
                whole = self.flat or (value.dim(), len(value) == self.size)
                found.append((name, value.dtype, value.device, shape, whole))
            elif value is None or isinstance(value, bool | int | float | str):
                found.append((name, value))
            else:
                return None
        return tuple(found)


def flat(part: nn.Module, asked: list[Call]) -> list[Tensor]:
    """The results of a linear layer, which takes each position by itself: there is nothing to pad."""
    inputs: list[Tensor] = [next(iter(call.given.values())) for call in asked]
    flat = [value.flatten(0, -2) for value in inputs]
    found: Any = torch.split(part(torch.cat(flat)), [len(value) for value in flat])
    return [own.view(*value.shape[:-1], -1) for own, value in zip(found, inputs, strict=True)]


def together(asked: list[Call]) -> dict[str, Any]:
    """The arguments of all calls as those of one, shorter rows padded at their ends and masked."""
    given = [call.given for call in asked]
    lengths = {call.length for call in asked}
    longest: dict[str, int] = {}
    for name, mask in MASKED.items():
        found: list[Tensor] = [one[name] for one in given if one.get(name) is not None]
        own = {value.shape[1] for value in found}
        if not own:
            continue
        # What a decoder attends to must not be as long as its own rows are, or it would be cut as they are (`Rows.of`).
        beside = name.startswith("encoder_") and len(lengths) > 1 and max(own) == max(lengths)
        longest[name] = longest[mask] = max(own) + beside
        if own != {longest[name]} and given[0].get(mask) is None:
            for one, value in zip(given, found, strict=True):
                one[mask] = torch.ones(value.shape[:2], dtype=torch.long, device=value.device)
    made: dict[str, Any] = {}
    for name, first in given[0].items():
        if not isinstance(first, Tensor):
            made[name] = first
            continue
        parts = [one[name].expand(call.size, *one[name].shape[1:]) for one, call in zip(given, asked, strict=True)]
        made[name] = torch.cat(_padded(parts, longest.get(name, max(lengths))) if name in LONG else parts)
    return made


def _padded(parts: list[Tensor], length: int) -> list[Tensor]:
    return [F.pad(part, (*[0, 0] * (part.dim() - 2), 0, length - part.shape[1])) for part in parts]


def apart(result: Any, asked: list[Call]) -> list[Any]:
    """Each call's part of a result; caches, which training needs not, are left out."""
    sizes, lengths = [call.size for call in asked], [call.length for call in asked]
    if isinstance(result, Tensor):
        if result.dim() == 0 or len(result) != sum(sizes):
            return [result] * len(sizes)
        cut = result.dim() == 3 and result.shape[1] == max(lengths)
        parts = zip(torch.split(result, sizes), lengths, strict=True)
        return [part[:, :length] if cut and length < max(lengths) else part for part, length in parts]
    if isinstance(result, Mapping):
        found = {name: apart(value, asked) for name, value in result.items()}
        return [type(result)(**{name: parts[i] for name, parts in found.items()}) for i in range(len(sizes))]
    if isinstance(result, tuple | list):
        each = [apart(value, asked) for value in result]
        return [type(result)(parts[i] for parts in each) for i in range(len(sizes))]
    return [None if hasattr(result, "get_seq_length") else result] * len(sizes)
