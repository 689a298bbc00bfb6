"""What `train` with several recipes and `sweep` have in common."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console

from ..errors import TrainingError


def together(console: Console, recipes: Sequence[Any], resume: bool, overwrite: bool) -> None:
    """Train recipes at once, show how they get on, and their ranking. Raises: TrainingError, where some failed."""
    from .. import many
    from ..board import Board
    from ..report import columns
    from ..tasks import TASKS

    say = partial(console.print, markup=False, soft_wrap=True)
    many.check(recipes)
    with Board(console, many.names_of(recipes), TASKS[recipes[0].task].metric) as board:
        ranking = many.train_many(recipes, say, board.callbacks, resume, overwrite)
    folder = many.folder_of(recipes)
    many.write(ranking, folder)
    say("", columns(many.table(ranking)), f"\nThe ranking and the plot of all losses are in {folder}", sep="\n")
    if failed := many.failures(ranking):
        raise TrainingError(" ".join(failed))
