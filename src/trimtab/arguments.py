"""What a recipe's training settings are to transformers' Trainer."""

import math
from typing import Any

import torch
import transformers

from .errors import ConfigError
from .recipe import OWN, UNWARMED, WATCHING, Recipe
from .tasks import TASKS
from .trainer import Trainer

CHECKPOINTS = "checkpoints"
RENAMED = {f"gradient_checkpointing{end}": f"activation_checkpointing{end}" for end in ("", "_kwargs")}
GENERATED = 128  # tokens that a model writes at most, where the recipe says nothing


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe's training settings over defaults for small data: evaluate each epoch, keep the best checkpoint.

    The learning rate is the LoRA paper's for RoBERTa base (table 9), times what suits the method better.
    """
    evaluated, task = recipe.training.get("eval_strategy", "epoch"), TASKS[recipe.task]
    best: dict[str, Any] = {"metric_for_best_model": task.metric, "greater_is_better": task.higher_is_better}
    if recipe.training.get("metric_for_best_model", task.metric).removeprefix("eval_") != task.metric:
        best = {}
    return {
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "learning_rate": 5e-4 * recipe.relative_rate,
        "lr_scheduler_type": "linear",
        **({} if recipe.training.get("lr_scheduler_type") in UNWARMED else {"warmup_steps": 0.1}),
        "eval_strategy": evaluated,
        "save_strategy": evaluated,
        "save_steps": recipe.training.get("eval_steps") or 500,
        "save_total_limit": 2,  # the best and the last
        "load_best_model_at_end": evaluated != "no",
        **best,
        **({"generation_max_length": GENERATED} if task.generates else {}),
        "logging_steps": 1,
        "seed": 0,
        **recipe.training,
    }


def arguments_of(recipe: Recipe) -> transformers.TrainingArguments:
    """What transformers' Trainer is told. Of several processes each waits here for the others. Raises: ConfigError."""
    settings: dict[str, Any] = {
        "dataloader_pin_memory": torch.cuda.is_available(),  # without a graphics card it only warns
        "use_cpu": not torch.accelerator.is_available(),  # without it bf16 is refused there
        **settings_of(recipe),
        "output_dir": str(recipe.output / CHECKPOINTS),
        "logging_nan_inf_filter": False,
        "ddp_find_unused_parameters": True,  # those of layers that are frozen for now
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "restore_callback_states_from_checkpoint": True,  # early stopping goes on counting
    }
    for old, new in RENAMED.items():  # recipes may have either
        if old in settings and new in transformers.TrainingArguments.__dataclass_fields__:
            settings[new] = settings.pop(old)
    for own in (*OWN, "label_smoothing_factor"):  # which are not the Trainer's
        settings.pop(own, None)
    try:
        arguments = transformers.Seq2SeqTrainingArguments(**settings)
        if arguments.lr_scheduler_type in WATCHING:  # else it would take a growing accuracy for a growing loss
            mode = "max" if arguments.greater_is_better else "min"
            arguments.lr_scheduler_kwargs = {**settings.get("lr_scheduler_kwargs", {}), "mode": mode}
        Trainer.get_optimizer_cls_and_kwargs(arguments)
        _try_schedule(arguments)
    except (ValueError, TypeError, ArithmeticError, ImportError) as error:
        raise ConfigError(f"training: {str(error).strip().splitlines()[0]}") from None
    return arguments


def steps_of(arguments: transformers.TrainingArguments, rows: int) -> int:
    """How often a training on so many rows changes the weights."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batches: int = math.ceil(rows / arguments.train_batch_size / arguments.world_size)
    return math.ceil(arguments.num_train_epochs * math.ceil(batches / arguments.gradient_accumulation_steps))


def _try_schedule(arguments: transformers.TrainingArguments) -> None:
    """Make a learning-rate schedule for nothing: the Trainer makes its own only when training starts."""
    optimizer = torch.optim.SGD([torch.zeros(1)])
    settings: Any = arguments.lr_scheduler_kwargs
    transformers.get_scheduler(arguments.lr_scheduler_type, optimizer, 1, 2, scheduler_specific_kwargs=settings)
