"""`trimtab methods`: all methods, and what each costs on a model."""

from typing import Annotated

import typer


def methods(
    model: Annotated[str | None, typer.Option(help="A model's folder or hub id: count parameters on it.")] = None,
) -> None:
    """List the methods: whether they merge into the weights, where they fit, their latency and paper.

    With --model only the model's config is read, no weights.
    """
    from .quiet import quiet

    quiet()
    from ..catalog import table
    from ..report import columns

    if model is None:
        print(columns(table()))
        return
    from ..outline import outline

    print(columns(table(outline(model))))
