"""Paths in recipes: absolute, or relative to the recipe's folder."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo


def _from_recipe(path: Path, info: ValidationInfo) -> Path:
    folder: Path = (info.context or {}).get("folder", Path.cwd())
    return (folder / path.expanduser()).absolute()


RecipePath = Annotated[Path, AfterValidator(_from_recipe)]
