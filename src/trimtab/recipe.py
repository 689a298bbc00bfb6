"""The recipe of a training run: a YAML file, every key known and every value of the right type.

    task: text-classification  # guessed from the data where it is not given
    model: path or hub id
    data: {train: train.csv, validation: 0.1, test: test.csv, columns: {text: review, label: stars}, max_length: 256}
    method: {name: lora, r: 8}
    quantization: none
    training: {epochs: 3, batch_size: 16, learning_rate: 5e-4, seed: 0}
    output: runs/reviews

Relative paths are relative to the recipe; `train: {path: stanfordnlp/sst2, split: train}` is a dataset of the hub. The
keys of `method` are those of the method's config class; those of `training` are `transformers.TrainingArguments`' own
(`Seq2SeqTrainingArguments`' for tasks that generate), the short names in `SHORT`, and these:

    class_weights: balanced           or {label: weight}; for tasks that tell classes apart (objective.py)
    distillation: {teacher: bigger, temperature: 2.0, weight: 0.5}    learn from a model, or a run, too (objective.py)
    early_stopping_patience: 2        stop after so many evaluations without a better score (`metric_for_best_model`);
    early_stopping_threshold: 0.01    better is by more than this; 0 without
    gradual_unfreezing: output        layer after layer joins, from the output or the input (layers.py),
    unfreezing_ratio: 0.5             within this share of all steps; 1 without
    layerwise_lr_decay: 0.9           each layer learns so much slower than the next one towards the output (layers.py)
    loraplus_lr_ratio: 16             LoRA's B learns so many times faster (optimizers.py)

A key without a value means its default. What is wrong is said with file and line: nothing in a recipe is ignored.
"""

import sys
import types
import typing
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from .adapter import PeftConfig
from .errors import ConfigError, RecipeError
from .methods import METHODS
from .methods.trainable_tokens import TrainableTokensConfig
from .methods.union import UnionConfig
from .objective import OBJECTIVES, Distillation
from .recipe_file import Loc, RecipeFile
from .tasks import TASKS, Data
from .tasks.augmentation import Augment
from .tasks.columns import Say
from .tasks.models import Quantization
from .tasks.paths import HubDataset, RecipePath
from .tasks.task import FILES

SHORT = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share of all steps
}

# TrainingArguments' fields that a run decides by itself, or that would act outside its folder.
NOT_OFFERED = frozenset(
    "accelerator_config batch_eval_metrics dataloader_drop_last ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb "
    "ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval do_predict do_train "
    "enable_jit_checkpoint eval_do_concat_batches eval_on_start eval_use_gather_object fsdp fsdp_config "
    "hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip "
    "include_for_metrics label_names local_rank log_level log_level_replica log_on_each_node logging_nan_inf_filter "
    "output_dir parallelism_config prediction_loss_only project push_to_hub remove_unused_columns report_to "
    "generation_config predict_with_generate restore_callback_states_from_checkpoint sortish_sampler "
    "resume_from_checkpoint run_name save_on_each_node save_only_model skip_memory_metrics trackio_bucket_id "
    "trackio_space_id trackio_static_space_id".split()
)

# The settings of `training` that are not TrainingArguments', with their types and limits.
OWN: dict[str, Any] = {
    "class_weights": (Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]], None),
    "distillation": (Distillation, None),
    "early_stopping_patience": (int, Field(None, ge=1)),
    "early_stopping_threshold": (float, Field(None, ge=0)),
    "gradual_unfreezing": (Literal["input", "output"], None),
    "layerwise_lr_decay": (float, Field(None, gt=0)),
    "loraplus_lr_ratio": (float, Field(None, gt=0)),
    "unfreezing_ratio": (float, Field(None, gt=0, le=1)),
}

# What means nothing alone.
NEEDS = {"early_stopping_threshold": "early_stopping_patience", "unfreezing_ratio": "gradual_unfreezing"}

WATCHING = ("reduce_lr_on_plateau", "greedy")  # schedules that go by the scores of evaluation,
UNWARMED = ("constant", *WATCHING)  # and those that know no warmup

# What TrainingArguments takes, but no training could be done with.
_SOME: dict[str, Any] = {"gt": 0}
LIMITS: dict[str, dict[str, Any]] = {
    "dataloader_num_workers": {"ge": 0},
    "generation_max_length": _SOME,
    "generation_num_beams": _SOME,
    "gradient_accumulation_steps": _SOME,
    "label_smoothing_factor": {"ge": 0, "le": 1},
    "learning_rate": _SOME,
    "max_grad_norm": {"ge": 0, "allow_inf_nan": True},  # infinite: gradients are measured, and none is cut
    "num_train_epochs": _SOME,
    "per_device_eval_batch_size": _SOME,
    "per_device_train_batch_size": _SOME,
    "seed": {"ge": 0, "lt": 2**32},
}

# Fields of the method's config that the run fills in itself.
FILLED_IN = ("auto_mapping", "base_model_name_or_path", "inference_mode", "revision", "task_type")


class Recipe(BaseModel):
    """A checked recipe. `training` has TrainingArguments' own names; `method` its name as "name", of a union a list."""

    model_config = ConfigDict(extra="forbid")

    task: str = ""  # guessed from the data
    model: str
    data: Data
    method: dict[str, Any] | list[dict[str, Any]] = {"name": "lora"}
    quantization: Quantization = "none"
    training: dict[str, Any] = {}
    output: RecipePath
    made_with: dict[str, str] | None = None  # in the recipe of a finished run: versions and hashes of what went in

    @field_validator("method", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("name a method, or several")
        if isinstance(value, list):
            return [{"name": part} if isinstance(part, str) else part for part in value]
        return {"name": value} if isinstance(value, str) else value

    @property
    def methods(self) -> list[dict[str, Any]]:
        """The method, or those of a union."""
        return self.method if isinstance(self.method, list) else [self.method]

    @property
    def relative_rate(self) -> float:
        """The learning rate that suits the method, in LoRA's; of a union the least."""
        return min(METHODS[method["name"]].relative_rate for method in self.methods)

    @property
    def seed(self) -> int:
        return int(self.training.get("seed", 0))

    def with_steps(self, steps: int) -> "Recipe":
        """The recipe, its methods told how many steps the run has, where they want to know. Raises: ConfigError."""
        told = [_told(method, steps) for method in self.methods]
        return self.model_copy(update={"method": told if isinstance(self.method, list) else told[0]})

    def config(self, tokens: Sequence[int] = (), **more: Any) -> PeftConfig:
        """The method's config, with settings that the recipe does not have; beside tokens that are trained, a union.

        Raises:
            ConfigError: settings that do not go together.
        """
        beside = [TrainableTokensConfig(token_indices=list(tokens))] if tokens else []
        if isinstance(self.method, list) or beside:
            return UnionConfig(methods=[*map(_made, self.methods), *beside], **more)
        return _made({**self.method, **more})

    def write(self, path: Path) -> None:
        """Save the recipe with every path absolute, so that it means the same anywhere on this machine."""
        path.write_text(yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    def plain(self) -> dict[str, Any]:
        """What `write` writes."""
        return self.model_dump(mode="json", exclude_none=True)


def read(path: Path, overrides: Iterable[str] = (), say: Say = lambda _: None, text: str | None = None) -> Recipe:
    """The recipe in a file, with `training.epochs=1` and the like put in place of what it says.

    Args:
        say: gets a line where the task is guessed. text: what the file would hold, if there were one.
    Raises:
        RecipeError: a file that is no recipe, an unknown key at any depth, or a value of the wrong type.
        DataError: no task is named, and the data are for none.
    """
    file = RecipeFile(path, text)
    for override in overrides:
        file.set(override)
    file.check_keys((), Recipe.model_fields)
    file.check_keys(("data",), Data.model_fields)
    for split in ("train", "validation", "test"):
        if file.is_mapping(("data", split)):
            file.check_keys(("data", split), HubDataset.model_fields)
    file.check_keys(("training",), None)
    file.check_keys(("data", "columns"), None)
    file.check_keys(("data", "augment"), Augment.model_fields)
    try:
        recipe = Recipe.model_validate(file.value(), context={"folder": path.absolute().parent})
    except ValidationError as error:
        raise _first(file, error) from None
    recipe.model = _model(file, ("model",), recipe.model)
    if not recipe.task:
        from .guess import task_of  # which imports transformers

        recipe.task = task_of(recipe.data, recipe.model)
        say(f"Task guessed: {recipe.task} (task: changes this)")
    file.check_choice(("task",), recipe.task, TASKS)
    file.check_keys(("data", "columns"), TASKS[recipe.task].usual)
    for key in recipe.data.model_fields_set - FILES - TASKS[recipe.task].reads:
        raise file.error(("data", key), f"data.{key} is of no use to {recipe.task}.")
    for i, reason in enumerate(recipe.data.drop or ()):
        if reason not in TASKS[recipe.task].drops:
            raise file.error(("data", "drop", i), f"data.drop: {reason} is of no use to {recipe.task}.")
    _check_methods(file, recipe)
    recipe.training = _training(file, recipe.training, TASKS[recipe.task].generates)
    _check_together(file, recipe)
    if taught := recipe.training.get("distillation"):
        taught["teacher"] = _model(file, ("training", "distillation", "teacher"), taught["teacher"])
    return recipe


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe. Of what depends on the task, all is allowed; `read` knows better."""
    found = Recipe.model_json_schema()
    training = _training_model(True).model_json_schema()
    training["properties"] |= {short: training["properties"][long] for short, long in SHORT.items()}
    one: dict[str, Any] = {"anyOf": [{"enum": list(METHODS)}]}
    for name, config in METHODS.items():
        method = config.model_json_schema()
        settings = {key: value for key, value in method["properties"].items() if key not in FILLED_IN}
        method |= {"properties": {"name": {"const": name}, **settings}, "required": ["name"]}
        found["$defs"] |= method.pop("$defs", {})
        one["anyOf"].append(method)
    found["$defs"] |= training.pop("$defs", {})
    found["properties"] |= {
        "task": {"enum": list(TASKS)},
        "method": {"anyOf": [one, {"type": "array", "items": one}]},
        "training": training,
    }
    del found["properties"]["made_with"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _model(file: RecipeFile, at: Loc, name: str) -> str:
    """A model's folder, absolute, or what may be its hub id."""
    beside = file.path.absolute().parent / name
    if beside.is_dir():
        return str(beside.resolve())
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise file.error(at, f"there is no model folder {name}.")
    return name


def _first(file: RecipeFile, error: ValidationError, under: Loc = ()) -> RecipeError:
    found = error.errors()[0]
    at: Loc = (*under, *(part for part in found["loc"] if isinstance(part, int) or part.isidentifier()))
    if found["type"] == "missing":
        return file.error(at[:-1], f"{file.name(at[:-1])} has no key {at[-1]!r}, which must be there.")
    message = "Input should be a path" if found["type"] == "path_type" else found["msg"].removeprefix("Value error, ")
    return file.error(at, f"{file.name(at)}: {message}.")


def _made(method: dict[str, Any]) -> PeftConfig:
    config = METHODS[method["name"]]
    untold = {config.counts_steps: sys.maxsize} if config.counts_steps else {}  # until the run is known
    return config(**{**untold, **{key: value for key, value in method.items() if key != "name"}})


def _told(method: dict[str, Any], steps: int) -> dict[str, Any]:
    setting = METHODS[method["name"]].counts_steps
    if setting is None:
        return method
    if method.get(setting, steps) > steps:
        raise ConfigError(f"method.{setting}={method[setting]}, but the run has {steps} steps. Leave it out.")
    return {setting: steps, **method}


def _check_methods(file: RecipeFile, recipe: Recipe) -> None:
    for number, method in enumerate(recipe.methods):
        _check_method(file, method, ("method", number) if isinstance(recipe.method, list) else ("method",))
    try:
        recipe.config()
    except ConfigError as error:
        raise file.error(("method",), str(error)) from None


def _check_method(file: RecipeFile, method: dict[str, Any], at: Loc) -> None:
    if "name" not in method:
        raise file.error(at, f"{file.name(at)} has no key 'name', which is one of: {', '.join(METHODS)}.")
    file.check_choice((*at, "name"), method["name"], METHODS)
    config = METHODS[method["name"]]
    if len(method) > 1:
        file.check_keys(at, ["name", *(key for key in config.model_fields if key not in FILLED_IN)])
    try:
        _made(method)
    except ConfigError as error:
        # A setting that is wrong by itself has a line; others are wrong together.
        key = next((key for key in method if f": {key}=" in str(error)), None)
        raise file.error((*at, key) if key else at, str(error)) from None


def _training(file: RecipeFile, given: dict[str, Any], generates: bool) -> dict[str, Any]:
    """The training settings, checked, by TrainingArguments' names."""
    if not given:
        return {}
    for key in NOT_OFFERED & set(given):
        raise file.error(("training", key), f"training.{key} cannot be set in a recipe: the run decides it.")
    known = _training_model(generates)
    file.check_keys(("training",), [*SHORT, *known.model_fields])
    for short, long in SHORT.items():
        if short in given and long in given:
            raise file.error(("training", long), f"training.{short} and training.{long} are the same; keep one.")
    written = {SHORT.get(key, key): key for key in given}
    try:
        checked = known.model_validate({long: given[key] for long, key in written.items()})
    except ValidationError as error:
        found = max(error.errors(), key=lambda one: len(one["loc"]))  # of a choice the one that was meant
        at: Loc = ("training", written[str(found["loc"][0])])
        for part in found["loc"][1:]:
            at = (*at, part) if file.has((*at, part)) else at
        raise file.error(at, f"{file.name(at)}: {found['msg']}.") from None
    if not 0 <= (ratio := given.get("warmup_ratio", 0)) < 1:
        raise file.error(("training", "warmup_ratio"), f"training.warmup_ratio={ratio} is no share of the steps.")
    return checked.model_dump(exclude_unset=True)


def _check_together(file: RecipeFile, recipe: Recipe) -> None:
    """Refuse settings that would do nothing beside the others, or for this task."""
    given = recipe.training

    def refuse(key: str, reason: str) -> RecipeError:
        written = next((short for short, long in SHORT.items() if long == key and not file.has(("training", key))), key)
        return file.error(("training", written), f"training.{written} is of no use {reason}.")

    task = TASKS[recipe.task]
    for key in task.useless.union(() if task.cross_entropy else OBJECTIVES) & set(given):
        raise refuse(key, f"to {recipe.task}")
    for key, needed in NEEDS.items():
        if key in given and needed not in given:
            raise refuse(key, f"without training.{needed}")
    schedule = given.get("lr_scheduler_type")
    if schedule in UNWARMED and given.get("warmup_steps"):
        raise refuse("warmup_steps", f"to the schedule {schedule!r}, which has no warmup")
    if schedule in WATCHING and "mode" in (given.get("lr_scheduler_kwargs") or {}):
        raise refuse("lr_scheduler_kwargs", "with a mode, which follows from the metric: leave that out")
    if given.get("eval_strategy") == "no":
        if schedule in WATCHING:
            raise refuse("lr_scheduler_type", f"as {schedule!r} where training.eval_strategy is 'no'")
        if "early_stopping_patience" in given:
            raise refuse("early_stopping_patience", "where training.eval_strategy is 'no'")


@cache
def _training_model(generates: bool) -> type[BaseModel]:
    """TrainingArguments' fields as a pydantic model; takes seconds, for transformers is imported."""
    from transformers import Seq2SeqTrainingArguments, TrainingArguments

    arguments = Seq2SeqTrainingArguments if generates else TrainingArguments
    hints = typing.get_type_hints(arguments)
    names = [name for name in arguments.__dataclass_fields__ if name not in NOT_OFFERED]
    fields: dict[str, Any] = {
        name: (_accepted(hints[name]), Field(None, **LIMITS[name]) if name in LIMITS else None) for name in names
    }
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return create_model("Training", __config__=config, **fields, **OWN)


def _accepted(hint: Any) -> Any:
    """The hint with each enum as its values; beside one, `str` means those values and nothing else."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    enums = [part for part in parts if isinstance(part, type) and issubclass(part, Enum)]
    if not enums:
        return hint
    values = [member.value for enum in enums for member in enum]
    return Literal[tuple(values)]
