"""`trimtab recipes`: recipes to start from, and what an editor needs to help with them."""

import json
from pathlib import Path
from typing import Annotated

import typer

SHIPPED = Path(__file__).parents[1] / "data" / "recipes"

recipes = typer.Typer(no_args_is_help=True, help="List and copy recipes to start from.")


def _shipped() -> dict[str, Path]:
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"), key=lambda path: path.stem)}


@recipes.command()
def ls() -> None:
    """List the recipes that come with trimtab."""
    found = {name: path.read_text(encoding="utf-8").splitlines()[0] for name, path in _shipped().items()}
    width = max(map(len, found))
    for name, line in found.items():
        print(f"{name:{width}}  {line.removeprefix('# ')}")


@recipes.command()
def cp(
    name: Annotated[str, typer.Argument(help="A name that `ls` lists.")],
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
) -> None:
    """Copy a recipe, to change its model and its data."""
    from ..errors import ConfigError, did_you_mean

    if name not in (known := _shipped()):
        raise ConfigError(f"There is no recipe {name!r}.{did_you_mean(name, known)}")
    if file.exists():
        raise ConfigError(f"{file} exists already. Name another file.")
    file.write_bytes(known[name].read_bytes())
    print(f"Wrote {file}. Change its model and its data, then: trimtab train {file}")


@recipes.command()
def schema() -> None:
    """Print the JSON schema of recipes, by which editors complete and check them.

    For example: trimtab recipes schema > recipe.schema.json, and as the first line of a recipe
    "# yaml-language-server: $schema=recipe.schema.json".
    """
    from .quiet import quiet

    quiet()
    from ..recipe import schema as written

    print(json.dumps(written(), indent=2))
