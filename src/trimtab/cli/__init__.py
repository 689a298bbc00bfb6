"""The command `trimtab`: one file per verb. Nothing here imports torch or transformers before a verb runs."""

import sys
from typing import Annotated

import typer

from ..errors import TrimtabError
from .chat import chat
from .combine import ManyWeights, combine
from .compare import compare
from .demo import demo
from .doctor import doctor
from .evaluate import evaluate
from .init import init
from .inspect import inspect
from .merge import merge
from .methods import methods
from .predict import predict
from .recipes import recipes
from .sweep import sweep
from .targets import targets
from .train import train

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Fine-tune pretrained models by training a small adapter and leaving the model alone.",
)  # fmt: skip
for verb in (demo, init, train, sweep, evaluate, predict, chat, compare, merge, inspect, targets, methods, doctor):
    app.command(no_args_is_help=verb not in (demo, methods, doctor))(verb)
app.command(cls=ManyWeights, no_args_is_help=True)(combine)
app.add_typer(recipes, name="recipes")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"trimtab {version('trimtab')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run a command line; what the user can put right is said in one line, with exit code 2."""
    try:
        app(arguments)
    except (TrimtabError, OSError) as error:  # such as a full disk, or a folder that may not be written to
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
