"""`trimtab merge`: a full model with the adapter folded in, checked before it is called done."""

from pathlib import Path
from typing import Annotated

import typer


def merge(
    folder: Annotated[Path, typer.Argument(help="The folder that train wrote.")],
    output: Annotated[Path, typer.Argument(help="The folder for the full model; must not exist yet.")],
) -> None:
    """Fold an adapter into its base model and save that as a plain model.

    The saved model must give the adapter's outputs, or nothing is left behind.
    """
    from .quiet import quiet

    quiet()
    from rich.console import Console

    from .. import run
    from ..progress import ProgressBar

    ProgressBar(Console(stderr=True))
    difference = run.merge(folder, output)
    print(f"Saved the full model in {output}; its outputs differ from the adapter's by at most {difference:.1g}.")
