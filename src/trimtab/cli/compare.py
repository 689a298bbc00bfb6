"""`trimtab compare`: which method is best on these data, and what each costs."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

USUAL = "lora,adalora,prefix,prompt,bottleneck,bitfit,ia3,full"


def compare(
    recipe: Annotated[Path, typer.Argument(help="The recipe; its own method's settings are kept.")],
    methods: Annotated[str, typer.Option(help="Methods, separated by commas; `trimtab methods` lists them.")] = USUAL,
    tries: Annotated[int, typer.Option(min=1, help="Learning rates for each, 4 times the one before.")] = 3,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Put a value in place of the recipe's.")
    ] = None,
) -> None:
    """Train several methods on a recipe's data and show them in one table, with a plot.

    All that was written lies in the recipe's output folder with -compared behind its name. What is trained already is
    not trained again.
    """
    from ..errors import ConfigError

    if not all(seed.strip().isdecimal() for seed in seeds.split(",")):
        raise ConfigError(f"--seeds {seeds}: write whole numbers, separated by commas.")
    from .quiet import quiet

    quiet()
    from rich.console import Console

    from .. import comparison
    from .. import recipe as recipes
    from ..progress import ProgressBar
    from ..report import columns

    console = Console(highlight=False)
    ProgressBar(console)
    say = partial(console.print, markup=False, soft_wrap=True)
    names = comparison.methods_of(methods)
    read = recipes.read(recipe, overrides or (), say)
    folder = read.output.with_name(f"{read.output.name}-compared")
    todo = comparison.trials(read, names, tries, [int(seed) for seed in seeds.split(",")], folder)
    found = comparison.compare(todo, folder, say)
    shown = [columns(comparison.table(found)), *comparison.failures(found)]
    say("", "\n".join(shown), f"\nThe table, the plot and each run are in {folder}", sep="\n")
