"""`trimtab train`: from a recipe, or from data and a model alone, to an adapter that was checked."""

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
    from ..errors import ConfigError

    unfinished = [path / "checkpoints" / "recipe.yaml" for path in given]
    given = [found if resume and found.is_file() else path for path, found in zip(given, unfinished, strict=True)]
    recipe = next((path for path in given if path.suffix not in (".yaml", ".yml")), given[0])
    is_recipe = recipe.suffix in (".yaml", ".yml")
    if model is not None and len(given) > 1:
        raise ConfigError("--model goes with one data file. Of several write recipes: trimtab init DATA --model MODEL")
    if is_recipe == (model is not None):
        wanted = (
            "has its model in it: --set model=MODEL changes it" if is_recipe else "needs --model MODEL, or a recipe"
        )
        raise ConfigError(f"{recipe} {wanted}.")
    from .quiet import quiet

    quiet()
    from rich.console import Console

    from .. import recipe as recipes
    from .. import training
    from ..progress import ProgressBar
    from ..propose import propose
    from ..report import plan, summary
    from .together import together

    console = Console(highlight=False, quiet=os.environ.get("RANK", "0") != "0")  # of several processes one speaks
    say, bar = partial(console.print, markup=False), ProgressBar(console)
    text = propose(recipe, model, overrides or []) if model else None
    paths = [Path("proposed recipe")] if text else given
    all_found = [recipes.read(path, overrides or (), say, text) for path in paths]
    if dry_run:
        for found in all_found:
            say(plan(training.planned(found, say)))
        return
    if len(all_found) > 1:
        together(console, all_found, resume, overwrite)
        return
    [found] = all_found
    result = training.train(found, say, [bar], resume, overwrite)
    if console.quiet:
        return
    console.print(summary(result.metrics))
    console.print(f"Saved in {result.folder}. Try: trimtab predict {result.folder} TEXT", soft_wrap=True)
