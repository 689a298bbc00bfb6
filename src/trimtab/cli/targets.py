"""`trimtab targets`: what a model offers to adapt."""

from typing import Annotated

import typer


def targets(model: Annotated[str, typer.Argument(help="A model's folder, or its id on the hub.")]) -> None:
    """List the layers of a model that adapters fit on; repeated layers are one line.

    Only the model's config is read, no weights.
    """
    from .quiet import quiet

    quiet()
    from ..adapter import HEADS
    from ..outline import fold, outline
    from ..report import columns
    from ..targets import adaptable, is_linear

    found = outline(model)
    modules = dict(found.named_modules())
    shown = {}
    for name, layout in adaptable(found).items():
        kernel = f", kernel {' x '.join(map(str, layout.kernel))}" if layout.kernel else ""
        shown[name] = f"{type(modules[name]).__name__}  {layout.into} -> {layout.out}{kernel}"
    heads = {"lm_head", *(head for names in HEADS.values() for head in names)}
    ends = {name.rsplit(".", 1)[-1] for name in shown if is_linear(modules[name])} - heads
    print(f"{type(found).__name__}: {len(shown)} layers that adapters fit on\n")
    print(columns([(line.name, line.what, f"x{line.count}") for line in fold(shown)]))
    print(f"\ntarget_modules: [{', '.join(sorted(ends))}]")
    print("An entry means every layer whose name ends in it; all-linear means every linear layer but the head.")
