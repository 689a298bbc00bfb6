"""A finished run: the folder that `train` writes, which is all that predict and merge need."""

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import recipe as recipes
from .adapter import PeftConfig
from .errors import CheckpointError, ConfigError, MergeError
from .merge import QuantizedMergeWarning
from .model import PeftModel
from .recipe import Recipe
from .tasks import TASKS, Task

RECIPE = "recipe.yaml"
METRICS = "metrics.json"
TOLERANCE = 1e-4  # on logits: what is saved must give what was there, up to rounding


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
    model, _ = base(recipe, task)
    return Run(recipe, task, PeftModel.from_pretrained(model, folder).eval())


def base(recipe: Recipe, task: Task) -> tuple[Any, list[str]]:
    """The recipe's model without an adapter, set to generate as the recipe says, and the names of its new modules.

    Raises:
        ConfigError: no such model, one that does not fit the task, or one that cannot write texts so long.
    """
    model, fresh = task.load_model(recipe.model, recipe.quantization)
    if not task.generates:
        return model, fresh
    if beams := recipe.training.get("generation_num_beams"):
        model.generation_config.num_beams = beams
    if length := recipe.training.get("generation_max_length"):
        configs = (model.config, model.config.get_text_config(decoder=True))
        known = [getattr(config, "max_position_embeddings", None) for config in configs]
        most = next(filter(None, known), length)  # T5 has no limit
        if length > most:
            raise ConfigError(
                f"{recipe.model} writes up to {most} tokens; training.generation_max_length is {length}. Make it less."
            )
        model.generation_config.update(max_length=length, max_new_tokens=None)
    return model, fresh


def logits(model: Any, batch: dict[str, Any]) -> Any:
    """All of the model's logits for a batch, as a flat float32 tensor on the CPU."""
    import torch

    with torch.inference_mode():
        found = model.eval()(**{name: value.to(model.device) for name, value in batch.items()})
    return torch.cat([found[name].flatten() for name in found if name.endswith("logits")]).float().cpu()


def merge(folder: Path, output: Path) -> float:
    """Save the base model with the adapter of a run folded in; the largest difference of their logits.

    Raises:
        CheckpointError: no run there, or an output folder that exists.
        MergeError: the merged model does not give the adapter's outputs. Nothing is left behind then.
    """
    if output.exists():
        raise CheckpointError(f"{output} exists already. Name a new folder.")
    found = load(folder)
    batch = found.task.example()
    expected = logits(found.model, batch)
    part = output.with_name(output.name + ".part")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QuantizedMergeWarning)  # measured below
            found.model.merge_and_unload().save_pretrained(part)
        found.task.save(part)
        merged, _ = found.task.load_model(str(part), "none")
        difference = float((logits(merged, batch) - expected).abs().max())
        if not difference <= TOLERANCE:
            raise MergeError(
                f"The merged model's logits differ from the adapter's by {difference:.2g}, more than {TOLERANCE:g}. "
                f"Nothing was saved: keep the adapter on its {found.recipe.quantization} base."
            )
        part.rename(output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return difference
