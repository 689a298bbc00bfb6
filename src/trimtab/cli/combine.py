"""`trimtab combine`: one adapter from several."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand


class ManyWeights(TyperCommand):
    """Reads `--weights 0.7 -0.3` as `--weights 0.7 --weights -0.3`: an option of typer takes one value at a time."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        for argument in args:
            if spread[-2:-1] == ["--weights"] and _is_number(argument):
                spread.append("--weights")
            spread.append(argument)
        return super().parse_args(ctx, spread)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def combine(
    folders: Annotated[list[str], typer.Argument(help="The adapters' folders, or their ids on the hub.")],
    output: Annotated[Path, typer.Option(help="The folder for the new adapter; must not exist yet.")],
    weights: Annotated[list[float], typer.Option(help="A weight for each adapter, of any sign.")],
    method: Annotated[
        str, typer.Option(help="linear (the exact sum), ties, dare_linear, dare_ties, magnitude_prune; with _svd cut.")
    ] = "linear",
    rank: Annotated[int | None, typer.Option(help="With _svd: the rank; by default the adapters' largest.")] = None,
    density: Annotated[
        float | None, typer.Option(help="The share of entries that pruning keeps; 0.2 by default.")
    ] = None,
) -> None:
    """Combine several adapters of one base model to one, which works without them.

    From runs of one task and base model, trimtab predict and merge take the result as they take a run.
    """
    from .quiet import quiet

    quiet()
    from .. import run

    kept, is_run = run.combine(folders, weights, output, method, rank, density)
    print(f"Saved the adapter in {output}; it keeps {min(kept.values()):.1%} of the change of each layer, or more.")
    if not is_run:
        print("It has no task: its parts are not runs of one task with the same labels on one model.")
