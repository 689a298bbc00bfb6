"""Where data are: paths, absolute or relative to the recipe's folder, and datasets of the hub."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo


def _from_recipe(path: Path, info: ValidationInfo) -> Path:
    folder: Path = (info.context or {}).get("folder", Path.cwd())
    return (folder / path.expanduser()).absolute()


RecipePath = Annotated[Path, AfterValidator(_from_recipe)]


class HubDataset(BaseModel):
    """A dataset of the Hugging Face hub, by `datasets.load_dataset`'s names: its id, configuration, part, version."""

    model_config = ConfigDict(extra="forbid")

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None

    def __str__(self) -> str:
        return ", ".join(str(value) for value in self.model_dump(exclude_none=True).values())


Source = RecipePath | HubDataset
