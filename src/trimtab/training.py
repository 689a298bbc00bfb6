"""The way from a recipe to a checked folder."""

import gc
import json
import os
import resource
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from rich.text import Text
from safetensors import SafetensorError
from torch import Tensor

from . import files, record, run, strategies, watch, weights
from .arguments import CHECKPOINTS, arguments_of, settings_of, steps_of
from .errors import CheckpointError, ConfigError, TrainingError, did_you_mean
from .kbit import prepare_model_for_kbit_training
from .lockstep import Job
from .model import get_peft_model
from .recipe import Recipe
from .run import METRICS, RECIPE, TOLERANCE
from .targets import PartialTargetWarning
from .tasks import TASKS, Task, packing
from .tasks.augmentation import Augmenter
from .tasks.columns import Say
from .tasks.task import Piece
from .trainer import RunTrainer, Trainer, had_stopped, last_checkpoint

NOT_WRITTEN = ("I/O error", "PytorchStreamWriter", "No space left", "unexpected pos")  # of safetensors, and of torch
SAMPLE = 8  # rows on which the saved adapter must predict what the trained one does


@dataclass(frozen=True)
class Result:
    """Where a run lies, and what is in its metrics.json."""

    folder: Path
    metrics: dict[str, Any]


def train(
    recipe: Recipe,
    say: Say = print,
    callbacks: Iterable[transformers.TrainerCallback] = (),
    resume: bool = False,
    overwrite: bool = False,
    augmenters: Sequence[Augmenter] = (),
    job: Job | None = None,
) -> Result:
    """Fine-tune as the recipe says, save the adapter, and check that it predicts the same when loaded again.

    Started by torchrun or `accelerate launch`, each process reads and encodes all rows by itself, and only then do they
    find each other: so none waits for another, which fails after a while, however long that takes. The first alone
    speaks, calls back, and writes.

    Args:
        say: gets a line for each thing worth knowing: columns guessed, rows dropped.
        callbacks: for the Trainer, for example a progress bar.
        resume: go on from the last checkpoint of a run of the same recipe that did not finish. On the CPU the result
            is that of a run without a break, bit for bit.
        overwrite: throw such a run away, which otherwise is refused.
        augmenters: each gives one more version of every training text, such as a translation there and back. They are
            called again when a run is gone on with, and must give the same then.
        job: of several trainings in lockstep, the one that this is (`train_many`).
    Raises:
        DataError, ConfigError, TargetError: before training starts. TrainingError: a loss or gradient that cannot be
        right, weights that do not change, or too little memory. CheckpointError: the saved adapter does not predict
        what the trained one does, or an unfinished run, or one that cannot be gone on with.
    """
    started = time.perf_counter()
    _make_folder(recipe.output)
    transformers.set_seed(recipe.seed)
    main = os.environ.get("RANK", "0") == "0"
    say = say if main else _silent
    noted: list[str] = []

    def note(line: Any) -> None:
        noted.append(str(line))
        say(line)

    task, rows = TASKS[recipe.task].from_data(recipe.data, recipe.model, recipe.seed, note, augmenters)
    made_with = _made_with(recipe, augmenters)
    arguments = arguments_of(recipe)
    recipe = _resolved(recipe, task).with_steps(steps_of(arguments, len(rows["train"])))
    recipe.made_with = made_with
    with arguments.main_process_first(local=False):
        last = _unfinished(recipe, resume, overwrite)
    _show_examples(task, rows["train"], say)
    model = adapted(recipe, task, job)
    trainer = RunTrainer(
        recipe.output,
        task.metrics,
        strategies.objective(recipe, arguments, model, task, rows["train"]),
        strategies.rates(recipe, arguments, model),
        job,
        task.write if task.generates else None,
        model=model,
        args=arguments,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=task.collate,
        preprocess_logits_for_metrics=task.reduced,
        callbacks=[
            *([record.History(recipe.output / record.HISTORY, _steps(last)), *callbacks] if main else ()),
            *strategies.callbacks(recipe, model),
        ],
    )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not trainer.is_fsdp_enabled:
        raise ConfigError(
            "accelerate was told to shard the model (FSDP), which it does among several graphics cards only. Here each "
            "process would train a whole one: say so, with ACCELERATE_USE_FSDP=false or in accelerate's config."
        )
    # Heads of classifiers take any keyword, from which Trainer concludes that they divide the loss by the labels of all
    # accumulated rows. They do not: loss and gradients would be those of one step times gradient_accumulation_steps.
    trainer.model_accepts_loss_kwargs &= task.divides_loss
    if recipe.data.packing:
        strategies.refuse(
            model, "data.packing", "acts_on_rows", "acts on each row as a whole, which in a block it could not"
        )
        packing.check(model, rows["train"])
    with watch.busy("Trying the longest batch"):
        trainer.try_longest(task.length)
    if job is not None:
        settings = arguments.activation_checkpointing_kwargs or {"use_reentrant": False}
        head = model.get_output_embeddings() if trainer.spares_logits else None
        job.lockstep.join(job, model, head, settings if arguments.activation_checkpointing else None)
    held_out = {split: found for split, found in rows.items() if split != "train"}
    before = {split: scores(trainer, found) for split, found in held_out.items()}
    _check_metric(arguments, before["validation"])
    trainer.forget_evaluation()
    start = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    if last is not None:
        steps = steps_of(arguments, len(rows["train"]))
        say(f"Going on after {_steps(last)} of {steps} steps; {steps - _steps(last)} are left.")
        if had_stopped(last):
            arguments.max_steps = _steps(last)
    with _written(recipe.output):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    if all(torch.equal(weights.whole(value), start[name]) for name, value in model.named_parameters() if name in start):
        raise TrainingError(
            f"Training changed no weight of the adapter in {trainer.state.global_step} steps. Is the learning rate far "
            "too small, or does the warmup (training.warmup_ratio) take all of them?"
        )
    known = _known(trainer)
    after = {split: known.get(split) or scores(trainer, found) for split, found in held_out.items()}
    trainable, total = model.get_nb_trainable_parameters()
    metrics: dict[str, Any] = {
        **after,
        "untrained": before,
        "majority": {split: task.baseline(rows["train"], found) for split, found in held_out.items()},
        "rows": {split: task.count(found) for split, found in rows.items()},
        "steps": trainer.state.global_step,
        "trainable_parameters": trainable,
        "total_parameters": total,
    }
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    with _written(recipe.output):
        if main:
            task.save(recipe.output)
            recipe.write(recipe.output / RECIPE)
        model.save_pretrained(recipe.output, is_main_process=main)
    config = model.peft_config["default"].to_dict()
    expected, device = _acting(model, task, held_out["validation"]), model.device
    del model, trainer
    gc.collect()
    if not main:
        return Result(recipe.output, metrics)
    _check_saved(recipe.output, held_out["validation"], expected, device)
    metrics["adapter_bytes"] = (recipe.output / files.WEIGHTS).stat().st_size
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    metrics["peak_memory_bytes"] = _peak_memory()
    (recipe.output / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    written = (recipe.output / RECIPE).read_text(encoding="utf-8")
    record.write(recipe.output, recipe.output.name, written, metrics, config, noted)
    shutil.rmtree(recipe.output / CHECKPOINTS, ignore_errors=True)
    return Result(recipe.output, metrics)


def _silent(line: Any) -> None:
    pass


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Turn what each library says of a disk that is full, or cannot be written to, into one error."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if not isinstance(error, OSError) and not any(words in reason for words in NOT_WRITTEN):
            raise
        raise CheckpointError(
            f"{folder} cannot be written to: {reason}. What was saved before is there: make room, and go on (--resume)."
        ) from None


@dataclass(frozen=True)
class Planned:
    """What `train` would do: the recipe with all that it leaves open, and how much that is."""

    recipe: Recipe
    rows: dict[str, int]
    trainable_parameters: int
    total_parameters: int
    steps: int


def planned(recipe: Recipe, say: Say = print) -> Planned:
    """What `train` would do with this recipe, in one process. No weights are loaded and nothing is written.

    Modules that the pretrained model turns out to lack, beside the usual heads, are not yet counted as trained.

    Raises: what `train` raises before it loads the model.
    """
    arguments = arguments_of(recipe)
    task, rows = TASKS[recipe.task].from_data(recipe.data, recipe.model, recipe.seed, say)
    steps = steps_of(arguments, len(rows["train"]))
    recipe = _resolved(recipe, task).with_steps(steps)
    _show_examples(task, rows["train"], say)
    with torch.device("meta"):
        model = with_adapter(recipe, task, task.outline(recipe.model), [])
    trainable, total = model.get_nb_trainable_parameters()
    return Planned(recipe, {split: task.count(found) for split, found in rows.items()}, trainable, total, steps)


def _show_examples(task: Task, rows: Any, say: Say) -> None:
    for i in range(min(2, len(rows))):
        say(_example(f"Example {i + 1}, what is learned in brackets: ", task.show(rows[i])))


def _resolved(recipe: Recipe, task: Task) -> Recipe:
    """The recipe with all that was guessed or left to defaults."""
    data = recipe.data.model_copy(update={"columns": task.names})
    return recipe.model_copy(update={"data": data, "training": settings_of(recipe)})


def _made_with(recipe: Recipe, augmenters: Sequence[Augmenter]) -> dict[str, str]:
    files = recipe.data.sources
    if recipe.data.augment and recipe.data.augment.synonyms:
        files["synonyms"] = recipe.data.augment.synonyms
    taught = {"teacher": recipe.training["distillation"]["teacher"]} if "distillation" in recipe.training else {}
    made = record.made_with({"model": recipe.model, **taught}, files)
    if augmenters:
        made["augmenters"] = ", ".join(getattr(one, "__name__", type(one).__name__) for one in augmenters)
    return made


def _unfinished(recipe: Recipe, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from. Leaves only it, beside the recipe that it is of.

    Raises:
        CheckpointError: there is one and it is not said what to do with it, or it is of another recipe.
    """
    folder = recipe.output / CHECKPOINTS
    last = last_checkpoint(folder)
    if last is not None and not (resume or overwrite):
        raise CheckpointError(
            f"{recipe.output} holds an unfinished run, {_steps(last)} steps of it. Go on with it (--resume), or throw "
            "it away (--overwrite)."
        )
    if last is not None and not overwrite:
        known = dict(flat(yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))))
        now = dict(flat(recipe.plain()))
        changed = [name for name in {**known, **now} if known.get(name) != now.get(name)]
        if changed:
            raise CheckpointError(
                f"The unfinished run in {recipe.output} is of another recipe: {changed[0]} was {known.get(changed[0])} "
                f"and is {now.get(changed[0])}. Change it back, or throw the run away (--overwrite)."
            )
    else:
        last = None
    for path in folder.glob("*"):
        if path.is_dir() and path != last and (last is None or _steps(path) > _steps(last)):
            shutil.rmtree(path)
    folder.mkdir(parents=True, exist_ok=True)
    recipe.write(folder / RECIPE)
    return last


def flat(settings: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """training.learning_rate and its value, and so on."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _steps(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def _example(title: str, pieces: Iterable[Piece]) -> Text:
    """On one line, without the middle of long pieces: their ends tell most."""
    shown = Text(title)
    for text, learned in pieces:
        line = " ".join(text.split()) if len(text) < 600 else f"{text[:300]} ... {text[-300:]}"
        shown.append(f"[{line}] " if learned else f"{line} ", "green" if learned else "")
    return shown


def _make_folder(output: Path) -> None:
    """Raises: ConfigError, where there is a folder with something else, which a run would write over."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    except (OSError, ValueError) as error:  # the latter of a name with a zero byte
        raise ConfigError(f"The output folder {output} cannot be made: {error}.") from None
    if names and not names & {CHECKPOINTS, files.CONFIG}:
        raise ConfigError(f"The output folder {output} holds no run, but {min(names)}. Name another, or a new one.")


def adapted(recipe: Recipe, task: Task, job: Job | None = None) -> Any:
    """The recipe's model with a new adapter. Raises: ConfigError, TargetError."""
    load = partial(run.base, recipe, task)
    model, fresh = load() if job is None else job.lockstep.load(load)
    if recipe.quantization != "none":
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return with_adapter(recipe, task, model, fresh)


def with_adapter(recipe: Recipe, task: Task, model: Any, fresh: list[str]) -> Any:
    """The model with a new adapter and with `fresh`, modules that are new themselves, to be trained."""
    named = [name for method in recipe.methods for name in method.get("modules_to_save", ())]
    whole = list(dict.fromkeys([*named, *fresh])) or None
    config = recipe.config(task.tokens(), task_type=task.task_type, modules_to_save=whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PartialTargetWarning)
        try:
            return get_peft_model(model, config)
        except PartialTargetWarning as warning:
            raise ConfigError(f"{warning} The command `trimtab targets {recipe.model}` lists what there is.") from None


def scores(trainer: Trainer, rows: Any) -> dict[str, float]:
    """The task's metrics of encoded rows, and their loss."""
    return _scores(trainer.predict(rows, metric_key_prefix="").metrics or {}, "_")


def _known(trainer: Trainer) -> dict[str, dict[str, float]]:
    """By split, scores taken in training: those of the best checkpoint, if the model has it again."""
    state = trainer.state
    if not trainer.args.load_best_model_at_end or state.best_model_checkpoint is None:
        return {}
    kept = _steps(Path(state.best_model_checkpoint))  # the best step may have been one without a checkpoint
    lines = (line for line in state.log_history if line["step"] == kept and "eval_loss" in line)
    return {"validation": _scores(next(lines), "eval_")}


def _scores(measured: dict[str, float], prefix: str) -> dict[str, float]:
    named = {name.removeprefix(prefix): value for name, value in measured.items() if name.startswith(prefix)}
    return {name: value for name, value in named.items() if not name.endswith(("runtime", "per_second", "time"))}


def _check_metric(arguments: transformers.TrainingArguments, scores: dict[str, float]) -> None:
    wanted = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    if wanted not in scores:
        raise ConfigError(f"training.metric_for_best_model: there is no {wanted!r}.{did_you_mean(wanted, scores)}")


def _samples(task: Task, rows: Any) -> Iterator[dict[str, Any]]:
    for first in range(0, len(rows), SAMPLE):
        yield task.collate([rows[i] for i in range(first, min(first + SAMPLE, len(rows)))])


def _acting(model: Any, task: Task, rows: Any) -> Tensor:
    """The logits of the first sample, once there is one of which the adapter changes something."""
    first: Tensor | None = None
    for sample in _samples(task, rows):  # the first one is enough, unless little makes the adapter act
        found = run.logits(model, sample)
        first = found if first is None else first
        with model.disable_adapter():
            if not torch.equal(found, run.logits(model, sample)):
                return first
    raise TrainingError("The trained adapter changes no prediction. Does anything in these rows make it act?")


def _check_saved(folder: Path, rows: Any, expected: Tensor, device: torch.device) -> None:
    loaded = run.load(folder)
    if loaded.recipe.quantization == "none":  # quantized models are where they are to be already
        loaded.model.to(device)
    off = (run.logits(loaded.model, next(_samples(loaded.task, rows))) - expected).abs().max().item()
    if not off <= TOLERANCE:
        raise CheckpointError(f"The adapter saved in {folder} does not predict what was trained (off by {off:g}).")


def _peak_memory() -> int:
    """Bytes: of the graphics card where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
