"""A finished run: the folder that `train` writes, which is all that predict and merge need."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import recipe as recipes
from .adapter import PeftConfig
from .errors import CheckpointError
from .model import PeftModel
from .recipe import Recipe
from .tasks import TASKS, Task

RECIPE = "recipe.yaml"
METRICS = "metrics.json"


@dataclass(frozen=True)
class Run:
    """The base model as the recipe has it, with the trained adapter on it, and the task it was trained for."""

    recipe: Recipe
    task: Task
    model: Any


def load(folder: Path) -> Run:
    """The run in a folder, ready to predict.

    Raises:
        CheckpointError: no such folder, none that `train` wrote, or an adapter that does not fit its base.
        ConfigError: the base model is no longer where it was.
    """
    PeftConfig.from_pretrained(folder)  # says so where there is no adapter at all
    if not (folder / RECIPE).is_file():
        raise CheckpointError(f"{folder} was not written by `trimtab train`: there is no {RECIPE} in it.")
    recipe = recipes.read(folder / RECIPE)
    task = TASKS[recipe.task].from_folder(folder)
    model, _ = task.load_model(recipe.model, recipe.quantization)
    return Run(recipe, task, PeftModel.from_pretrained(model, folder).eval())
