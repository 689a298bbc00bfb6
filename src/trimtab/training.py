"""Train: a `transformers.Trainer` that knows adapter checkpoints, and the way from a recipe to a checked folder."""

import gc
import json
import math
import resource
import shutil
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from . import checkpoint, files, run
from .errors import CheckpointError, ConfigError, TrimtabError, did_you_mean
from .kbit import prepare_model_for_kbit_training
from .model import PeftModel, get_peft_model
from .optimizers import create_loraplus_optimizer
from .recipe import LORAPLUS, Recipe
from .run import METRICS, RECIPE, TOLERANCE
from .targets import PartialTargetWarning
from .tasks import TASKS, Task
from .tasks.task import Say

CHECKPOINTS = "checkpoints"
SAMPLE = 32  # rows on which the saved adapter must predict what the trained one does


class TrainingError(TrimtabError):
    """A run that cannot come to anything: a loss that is no number, or weights that never change."""


class Trainer(transformers.Trainer):
    """transformers' Trainer; a model with adapters resumes, and gets its best checkpoint, from the adapter files.

    The plain one trains and saves such a model too, but reads checkpoints of full models and of HF PEFT only.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        if isinstance(target, PeftModel):
            _read(target, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        target = self.accelerator.unwrap_model(self.model)
        if isinstance(target, PeftModel):
            _read(target, Path(self.state.best_model_checkpoint or ""))
        else:
            super()._load_best_model()


def _read(model: PeftModel, folder: Path) -> None:
    """Read the weights of all adapters, from where `save_pretrained` puts them."""
    for name in model.peft_config:
        own = folder / name
        checkpoint.load_weights(model, own if files.current(own, files.WEIGHTS).is_file() else folder, name)


class _Guard(transformers.TrainerCallback):
    """Stops at the first loss or gradient that is no number; every step is logged for that."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for what in ("loss", "grad_norm"):
            if not math.isfinite(value := float((logs or {}).get(what, 0))):
                raise TrainingError(
                    f"The {what} is {value} at step {state.global_step}: training cannot go on. Try a lower "
                    f"training.learning_rate (it is {args.learning_rate:g}), more training.warmup_ratio, and no fp16."
                )


@dataclass(frozen=True)
class Result:
    """Where a run lies, and what is in its metrics.json."""

    folder: Path
    metrics: dict[str, Any]


def train(recipe: Recipe, say: Say = print, callbacks: Iterable[transformers.TrainerCallback] = ()) -> Result:
    """Fine-tune as the recipe says, save the adapter, and check that it predicts the same when loaded again.

    Args:
        say: gets a line for each thing worth knowing: columns guessed, rows dropped.
        callbacks: for the Trainer, for example a progress bar.
    Raises:
        DataError, ConfigError, TargetError: before training starts. TrainingError: a loss that is no number, or
        weights that do not change. CheckpointError: the saved adapter does not predict what the trained one does.
    """
    started = time.perf_counter()
    arguments = _arguments(recipe)
    transformers.set_seed(recipe.seed)
    task, rows = TASKS[recipe.task].from_data(recipe.data, recipe.model, recipe.seed, say)
    model = _adapted(recipe, task)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=task.collate,
        compute_metrics=task.metrics,
        callbacks=[_Guard(), *callbacks],
        optimizers=(_optimizer(recipe, arguments, model), None),
    )
    # Heads of classifiers take any keyword, from which Trainer concludes that they divide the loss by the number of
    # accumulated rows. They do not: loss and gradients would be those of one step times gradient_accumulation_steps.
    trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(transformers.PrinterCallback)
    held_out = {split: found for split, found in rows.items() if split != "train"}
    before = {split: _scores(trainer, found) for split, found in held_out.items()}
    _check_metric(arguments, before["validation"])
    start = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    trainer.train()
    if all(torch.equal(value, start[name]) for name, value in model.named_parameters() if name in start):
        raise TrainingError("Training changed no weight of the adapter. Is the learning rate far too small?")
    after = {split: _scores(trainer, found) for split, found in held_out.items()}
    trainable, total = model.get_nb_trainable_parameters()
    metrics: dict[str, Any] = {
        **after,
        "untrained": before,
        "majority": {split: task.baseline(rows["train"], found) for split, found in held_out.items()},
        "rows": {split: len(found) for split, found in rows.items()},
        "steps": trainer.state.global_step,
        "trainable_parameters": trainable,
        "total_parameters": total,
    }
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    _save(recipe, task, model)
    expected, device = run.logits(model, _sample(task, held_out["validation"])), model.device
    del model, trainer
    gc.collect()
    _check_saved(recipe.output, held_out["validation"], expected, device)
    metrics["adapter_bytes"] = (recipe.output / files.WEIGHTS).stat().st_size
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    metrics["peak_memory_bytes"] = _peak_memory()
    (recipe.output / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(recipe.output / CHECKPOINTS, ignore_errors=True)
    return Result(recipe.output, metrics)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe's training settings over defaults for small data: evaluate each epoch, keep the best checkpoint.

    The learning rate is the LoRA paper's for RoBERTa base (table 9): ten times and more that of full fine-tuning.
    """
    evaluated = recipe.training.get("eval_strategy", "epoch")
    return {
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "eval_strategy": evaluated,
        "save_strategy": evaluated,
        "save_steps": recipe.training.get("eval_steps") or 500,
        "save_total_limit": 1,
        "load_best_model_at_end": evaluated != "no",
        "metric_for_best_model": TASKS[recipe.task].metric,
        "logging_steps": 1,
        "seed": 0,
        **recipe.training,
    }


def _arguments(recipe: Recipe) -> transformers.TrainingArguments:
    settings: dict[str, Any] = {
        "dataloader_pin_memory": torch.cuda.is_available(),  # without a graphics card it only warns
        "use_cpu": not torch.accelerator.is_available(),  # without it bf16 is refused there
        **_settings(recipe),
        "output_dir": str(recipe.output / CHECKPOINTS),
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    settings.pop(LORAPLUS, None)
    try:
        recipe.output.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(recipe.output / CHECKPOINTS, ignore_errors=True)  # of a run that did not finish
        arguments = transformers.TrainingArguments(**settings)
        Trainer.get_optimizer_cls_and_kwargs(arguments)
        _try_schedule(arguments)
    except OSError as error:
        raise ConfigError(f"The output folder {recipe.output} cannot be made: {error.strerror}.") from None
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training: {str(error).strip().splitlines()[0]}") from None
    return arguments


def _try_schedule(arguments: transformers.TrainingArguments) -> None:
    """Make a learning-rate schedule for nothing: the Trainer makes its own only when training starts."""
    optimizer = torch.optim.SGD([torch.zeros(1)])
    settings: Any = arguments.lr_scheduler_kwargs
    transformers.get_scheduler(arguments.lr_scheduler_type, optimizer, 1, 2, scheduler_specific_kwargs=settings)


def _adapted(recipe: Recipe, task: Task) -> Any:
    model, fresh = task.load_model(recipe.model, recipe.quantization)
    if recipe.quantization != "none":
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    saved = list(dict.fromkeys([*recipe.method.get("modules_to_save", ()), *fresh]))
    config = recipe.config(task_type=task.task_type, modules_to_save=saved or None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PartialTargetWarning)
        try:
            return get_peft_model(model, config)
        except PartialTargetWarning as warning:
            raise ConfigError(f"{warning} The command `trimtab targets {recipe.model}` lists what there is.") from None


def _optimizer(recipe: Recipe, arguments: transformers.TrainingArguments, model: Any) -> torch.optim.Optimizer | None:
    """LoRA+'s, where the recipe asks for it."""
    ratio = recipe.training.get(LORAPLUS)
    if ratio is None:
        return None
    chosen, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    return create_loraplus_optimizer(
        model, chosen, loraplus_lr_ratio=ratio, loraplus_weight_decay=arguments.weight_decay, **settings
    )


def _scores(trainer: Trainer, rows: Any) -> dict[str, float]:
    measured = trainer.predict(rows, metric_key_prefix="").metrics or {}
    named = {name.removeprefix("_"): value for name, value in measured.items()}
    return {name: value for name, value in named.items() if not name.endswith(("runtime", "per_second", "time"))}


def _check_metric(arguments: transformers.TrainingArguments, scores: dict[str, float]) -> None:
    wanted = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    if wanted not in scores:
        raise ConfigError(f"training.metric_for_best_model: there is no {wanted!r}.{did_you_mean(wanted, scores)}")


def _save(recipe: Recipe, task: Task, model: Any) -> None:
    task.save(recipe.output)
    resolved = {"data": recipe.data.model_copy(update={"columns": task.names}), "training": _settings(recipe)}
    recipe.model_copy(update=resolved).write(recipe.output / RECIPE)
    model.save_pretrained(recipe.output)


def _sample(task: Task, rows: Any) -> dict[str, Any]:
    return task.collate([rows[i] for i in range(min(SAMPLE, len(rows)))])


def _check_saved(folder: Path, rows: Any, expected: Tensor, device: torch.device) -> None:
    loaded = run.load(folder)
    if loaded.recipe.quantization == "none":  # quantized models are where they are to be already
        loaded.model.to(device)
    off = (run.logits(loaded.model, _sample(loaded.task, rows)) - expected).abs().max().item()
    if not off <= TOLERANCE:
        raise CheckpointError(f"The adapter saved in {folder} does not predict what was trained (off by {off:g}).")


def _peak_memory() -> int:
    """Bytes: of the graphics card where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
