"""`trimtab predict`: what a tuned model answers, from the adapter's folder alone."""

import json
from pathlib import Path
from typing import Annotated

import typer

PART = 64  # inputs that are predicted before the progress bar moves


def predict(
    folder: Annotated[Path, typer.Argument(help="The folder that train wrote.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="The texts.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="A file of texts: one a line in a .txt, else columns as trained on.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Predict with a tuned model: classes and their probabilities, or what the task's answer is."""
    from ..errors import DataError

    if bool(texts) == bool(file):
        raise DataError("predict needs texts, or --file with a file of texts, not both.")
    from .quiet import quiet

    quiet()
    from rich.console import Console

    from .. import run, watch
    from ..progress import ProgressBar
    from ..report import predictions

    ProgressBar(Console(stderr=True))
    found = run.load(folder)
    inputs = found.task.inputs(file) if file else found.task.asked(texts or ())
    parts = [inputs[start : start + PART] for start in range(0, len(inputs), PART)]
    watched = watch.through("Predicting", parts)
    answers = [answer for part in watched for answer in found.task.predict(found.model, part)]
    shown = [found.task.title(given) for given in inputs]
    if as_json:
        for text, answer in zip(shown, answers, strict=True):
            print(json.dumps({"input": text, **answer}, ensure_ascii=False))
        return
    Console(highlight=False).print(predictions(shown, answers))
