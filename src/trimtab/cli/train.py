"""`trimtab train`: from a recipe, or from data and a model alone, to an adapter that was checked."""

import gc
import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer


def train(
    given: Annotated[
        list[Path],
        typer.Argument(metavar="RECIPE...|DATA", help="Recipes (.yaml), or data; with --resume a run's folder."),
    ],
    model: Annotated[str | None, typer.Option(help="With data: the model's folder, or its id on the hub.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Put a value in place of the recipe's.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a run that did not finish.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Throw away a run that did not finish.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Show what would be done; load no weights, write nothing.")] = False,
) -> None:
    """Fine-tune a model as a recipe says, or with none: trimtab train reviews.csv --model my-model

    For example: trimtab train recipe.yaml --set training.epochs=1

    Several recipes of one model and task are trained at once, over one copy of the model.
    """
    from .quiet import quiet

    quiet()
    from rich.console import Console

    from .. import training
    from ..progress import ProgressBar
    from ..report import plan, summary
    from .together import read, together

    gc.collect()
    gc.freeze()  # nor through all that again, each time that what was trained is let go
    console = Console(highlight=False, quiet=os.environ.get("RANK", "0") != "0")  # of several processes one speaks
    say, bar = partial(console.print, markup=False), ProgressBar(console)
    recipes = read(given, model, overrides or (), resume, say)
    if dry_run:
        for found in recipes:
            say(plan(training.planned(found, say)))
    elif len(recipes) > 1:
        together(console, recipes, resume, overwrite)
    else:
        result = training.train(recipes[0], say, [bar], resume, overwrite)
        if console.quiet:
            return
        console.print(summary(result.metrics))
        console.print(f"Saved in {result.folder}. Try: trimtab predict {result.folder} TEXT", soft_wrap=True)
