"""What `train` with several recipes and `sweep` have in common."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import ConfigError, TrainingError


def read(given: Sequence[Path], model: str | None, overrides: Sequence[str], resume: bool, say: Any) -> list[Any]:
    """The recipes in files or, to go on with, in folders of runs; or one for data and a model. Raises: ConfigError."""
    from .. import recipe as recipes
    from ..propose import propose

    unfinished = [path / "checkpoints" / "recipe.yaml" for path in given]
    paths = [found if resume and found.is_file() else path for path, found in zip(given, unfinished, strict=True)]
    data = [path for path in paths if path.suffix not in (".yaml", ".yml")]
    if model is None and data:
        raise ConfigError(f"{data[0]} needs --model MODEL, or a recipe.")
    if model is None:
        return [recipes.read(path, overrides, say) for path in paths]
    if not data:
        raise ConfigError(f"{paths[0]} has its model in it: --set model=MODEL changes it.")
    if len(paths) > 1:
        raise ConfigError("--model goes with one data file. For several write recipes: trimtab init DATA --model MODEL")
    return [recipes.read(Path("proposed recipe"), overrides, say, propose(paths[0], model, list(overrides)))]


def together(
    console: Console, recipes: Sequence[Any], resume: bool, overwrite: bool, at_once: int | None = None
) -> None:
    """Train recipes at once, show how they get on, and their ranking. Raises: TrainingError, where some failed."""
    from .. import many
    from ..board import Board
    from ..report import columns
    from ..tasks import TASKS

    say = partial(console.print, markup=False, soft_wrap=True)
    many.check(recipes)
    with Board(console, many.names_of(recipes), TASKS[recipes[0].task].metric) as board:
        ranking = many.train_many(recipes, say, board.callbacks, resume, overwrite, at_once, board.ended)
    folder = many.folder_of(recipes)
    many.write(ranking, folder)
    say("", columns(many.table(ranking)), f"\nThe ranking and the plot of all losses are in {folder}", sep="\n")
    if failed := many.failures(ranking):
        raise TrainingError(" ".join(failed))
