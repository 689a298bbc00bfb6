"""`trimtab init`: a recipe to start from."""

from pathlib import Path
from typing import Annotated

import typer


def init(
    data: Annotated[Path, typer.Argument(help="The training data: a table, a text, a folder or a .zip.")],
    model: Annotated[str, typer.Option(help="The model's folder, or its id on the hub.")],
    recipe: Annotated[Path, typer.Option(help="The file to write.")] = Path("recipe.yaml"),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="What is known of the recipe already.")
    ] = None,
) -> None:
    """Look at the data and write a commented recipe for them.

    The task and its columns are guessed; what was found in the data stands at the top of the file.
    """
    from ..errors import ConfigError

    if recipe.exists():
        raise ConfigError(f"{recipe} exists already. Name another file with --recipe.")
    from .quiet import quiet

    quiet()
    from rich.console import Console

    from ..progress import ProgressBar
    from ..propose import propose

    ProgressBar(Console(stderr=True))
    text = propose(data, model, overrides or [])
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(text, encoding="utf-8")
    print(f"Wrote {recipe}. Read it, then: trimtab train {recipe}")
