"""`trimtab targets`: what a model offers to adapt."""

from typing import Annotated

import typer


def targets(model: Annotated[str, typer.Argument(help="A model's folder, or its id on the hub.")]) -> None:
    """List the layers of a model that adapters fit on; repeated layers are one line.

    Only the model's config is read, no weights.
    """
    from .quiet import quiet

    quiet()
    from ..outline import fold, outline, usual_ends
    from ..report import columns
    from ..targets import adaptable, expert_parameters

    found = outline(model)
    modules = dict(found.named_modules())
    shown = {}
    for name, layout in adaptable(found).items():
        kernel = f", kernel {' x '.join(map(str, layout.kernel))}" if layout.kernel else ""
        shown[name] = f"{type(modules[name]).__name__}  {layout.into} -> {layout.out}{kernel}"
    print(f"{type(found).__name__}: {len(shown)} layers that adapters fit on\n")
    print(columns([(line.name, line.what, f"x{line.count}") for line in fold(shown)]))
    print(f"\ntarget_modules: [{', '.join(usual_ends(found))}]")
    print("An entry means every layer whose name ends in it; all-linear means every linear layer but the head.")
    if experts := expert_parameters(found):
        shapes = {name: " x ".join(map(str, found.get_parameter(name).shape)) for name in experts}
        print("\nParameters that are no layers, of experts:\n")
        print(columns([(line.name, line.what, f"x{line.count}") for line in fold(shapes)]))
        print(f"\ntarget_parameters: [{', '.join(sorted({name.rpartition('.')[2] for name in experts}))}]")
