"""`trimtab evaluate`: the scores of a finished run, and how sure they are."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    folder: Annotated[Path, typer.Argument(help="The folder that train wrote.")],
    file: Annotated[
        Path | None, typer.Option(help="More rows, with the columns trained on; else the run's own test rows.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a tuned model on the test rows of its run (without, on its validation rows), or on a file.

    Each score has the interval that covers 95 % of the scores of resampled rows.
    """
    from .quiet import quiet

    quiet()
    from rich.console import Console

    from .. import evaluation
    from ..progress import ProgressBar
    from ..report import intervals

    console = Console(highlight=False, stderr=as_json)
    say, bar = partial(console.print, markup=False), ProgressBar(console)
    found = evaluation.evaluate(folder, file, say, [bar])
    if as_json:
        print(json.dumps({"rows": found.rows, "scores": found.scores, "intervals": found.intervals}))
        return
    console.print(intervals(found))
