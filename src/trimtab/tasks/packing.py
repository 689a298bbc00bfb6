"""Packing: several rows of tokens in one block, so that batches are less padding (Krell et al. 2021, arXiv 2107.02027).

Rows go to blocks by best fit, longest first: each into the block that it leaves the least room in. Positions start
again with every row, by which transformers' masks keep rows apart, and the first label of a row is ignored, which
unpacked nothing predicts either. So the sum of losses and gradients is that of the rows alone. Models whose layers know
no masks, and adapters that act on a row as a whole, cannot be packed; `check` finds out on the model itself.
"""

import bisect
import itertools
from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError
from .token_classification import IGNORED

Row = dict[str, Any]  # input_ids, labels; of a block also position_ids


def packed(rows: Iterable[Row], size: int) -> list[Row]:
    """Blocks of up to `size` tokens, which no row is longer than."""
    blocks: list[list[Row]] = []
    with_room: dict[int, list[list[Row]]] = {}  # blocks by the tokens that are left in them
    rooms: list[int] = []  # its keys, sorted
    for row in sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True):
        length = len(row["input_ids"])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            room, block = size, list[Row]()
            blocks.append(block)
        else:
            room = rooms[place]
            block = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        block.append(row)
        if room - length not in with_room:
            bisect.insort(rooms, room - length)
        with_room.setdefault(room - length, []).append(block)
    return [_joined(block) for block in blocks]


def _joined(rows: list[Row]) -> Row:
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "position_ids": [place for row in rows for place in range(len(row["input_ids"]))],
        "labels": [label for row in rows for label in (IGNORED, *row["labels"][1:])],
    }


def check(model: Any, blocks: Iterable[Row]) -> None:
    """Raise a ConfigError where a row's logits depend on the rows beside it."""
    import torch

    block = next((block for block in blocks if block["position_ids"].count(0) > 1), None)
    if block is None:
        return
    ids, places = (torch.tensor([block[name]], device=model.device) for name in ("input_ids", "position_ids"))
    starts = [*(places[0] == 0).nonzero()[:, 0].tolist(), places.shape[1]]
    with torch.no_grad():
        together = model.eval()(input_ids=ids, position_ids=places).logits[0].float()
        alone = [model(input_ids=ids[:, a:b]).logits[0].float() for a, b in itertools.pairwise(starts)]
    apart = (together - torch.cat(alone)).abs().max().item()
    if not apart <= torch.finfo(model.dtype).eps ** 0.5 * together.abs().max().item():
        raise ConfigError(f"data.packing: in {type(model).__name__} a row's outputs depend on the rows beside it in a "
                          f"block (by {apart:.2g}). Leave packing out.")  # fmt: skip
