"""A finished run: the folder that `train` writes, which is all that predict and merge need."""

import dataclasses
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import checkpoint, watch
from . import recipe as recipes
from .auto import AutoPeftModel
from .errors import CheckpointError, ConfigError, MergeError
from .merge import QuantizedMergeWarning
from .methods import METHODS, PeftConfig
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
        if model.config.is_encoder_decoder:
            model.generation_config.update(max_length=length, max_new_tokens=None)
        else:  # the longest text is counted without the prompt
            model.generation_config.update(max_length=None, max_new_tokens=length)
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
            with watch.busy("Merging"):
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


def combine(
    folders: Sequence[str],
    factors: Sequence[float],
    output: Path,
    combination_type: str = "linear",
    svd_rank: int | None = None,
    density: float | None = None,
) -> tuple[dict[str, float], bool]:
    """Save what `PeftModel.add_weighted_adapter` makes of the adapters in folders.

    Returns:
        What is kept at each module, and whether the output is a run: those of one task and model give one.
    Raises:
        CheckpointError: an output folder that exists, or adapters of different models.
        AdapterError, ConfigError, MergeError: as `add_weighted_adapter` does.
    """
    if output.exists():
        raise CheckpointError(f"{output} exists already. Name a new folder.")
    bases = {folder: PeftConfig.from_pretrained(folder).base_model_name_or_path for folder in folders}
    if len(set(bases.values())) > 1:
        named = ", ".join(f"{folder} is of {base}" for folder, base in bases.items())
        raise CheckpointError(f"Adapters of different models cannot be combined: {named}.")
    first = load(Path(folders[0])) if (Path(folders[0]) / RECIPE).is_file() else None
    model = first.model if first else AutoPeftModel.from_pretrained(folders[0])
    names = ["default", *map(str, range(1, len(folders)))]
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, name)
    kept = model.add_weighted_adapter(names, list(factors), "all", combination_type, svd_rank=svd_rank, density=density)
    part = output.with_name(output.name + ".part")
    try:
        checkpoint.save(model, part, "all")
        is_run = first is not None and all(_is_alike(first, Path(folder)) for folder in folders[1:])
        if first is not None and is_run:
            first.task.save(part)
            what = " + ".join(f"{w:g} {folder}" for w, folder in zip(factors, folders, strict=True))
            _of_result(first.recipe, model.peft_config["all"], output, f"{combination_type}: {what}").write(
                part / RECIPE
            )
        part.rename(output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return kept, is_run


def _is_alike(first: Run, folder: Path) -> bool:
    """Whether the folder is a run in which the model's answers mean the same: labels in the same order, and so on."""
    if not (folder / RECIPE).is_file():
        return False
    recipe = recipes.read(folder / RECIPE)
    if (recipe.task, recipe.model) != (first.recipe.task, first.recipe.model):
        return False
    task = TASKS[recipe.task].from_folder(folder)
    return dataclasses.replace(task, names=first.task.names, reader=first.task.reader) == first.task


def _of_result(recipe: Recipe, config: PeftConfig, output: Path, what: str) -> Recipe:
    """The recipe with another method and output, and on record what was combined."""
    name = next(name for name, kind in METHODS.items() if type(config) is kind)
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude=set(recipes.FILLED_IN))
    made_with = {**(recipe.made_with or {}), "combined": what}
    update = {"method": {"name": name, **settings}, "output": output.absolute(), "made_with": made_with}
    return recipe.model_copy(update=update)
