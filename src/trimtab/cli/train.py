"""`trimtab train`: from a recipe to an adapter that was checked."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Put a value in place of the recipe's.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a run that did not finish.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Throw away a run that did not finish.")] = False,
) -> None:
    """Fine-tune a model as a recipe says.

    For example: trimtab train recipe.yaml --set training.epochs=1
    """
    from .quiet import quiet

    quiet()
    from rich.console import Console

    from .. import recipe as recipes
    from ..progress import ProgressBar
    from ..report import summary
    from ..training import train as run

    console = Console(highlight=False)
    say = partial(console.print, markup=False)
    result = run(recipes.read(recipe, overrides or ()), say, [ProgressBar(console)], resume, overwrite)
    console.print(summary(result.metrics))
    console.print(f"Saved in {result.folder}. Try: trimtab predict {result.folder} TEXT", soft_wrap=True)
