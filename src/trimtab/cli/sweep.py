"""`trimtab sweep`: one recipe in many variants, all trained at once."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer


def sweep(
    recipe: Annotated[Path, typer.Argument(help="The recipe, of which there will be variants.")],
    vary: Annotated[
        list[str],
        typer.Option("--vary", metavar="KEY=VALUE,VALUE", help="What to vary; several make every combination."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Put a value in place of the recipe's.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a sweep that did not finish.")] = False,
    at_once: Annotated[int | None, typer.Option(min=1, help="How many to train at a time; all by default.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Throw away runs that did not finish.")] = False,
) -> None:
    """Train variants of a recipe at once over one base model, and rank them.

    For example: trimtab sweep recipe.yaml --vary method.r=4,8,16 --vary training.learning_rate=1e-4,3e-4,1e-3

    Each has an output folder of its own, in one with -sweep behind the name of the recipe's.
    """
    from .quiet import quiet

    quiet()
    from rich.console import Console

    from .. import many
    from .together import together

    console = Console(highlight=False)
    say = partial(console.print, markup=False)
    together(console, many.variants(recipe, overrides or (), vary, say), resume, overwrite, at_once)
