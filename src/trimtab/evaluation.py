"""Scores of a finished run, each with the interval in which it would lie on other rows of the same kind."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from . import record, run, watch
from .arguments import arguments_of
from .run import Run
from .tasks import TASKS
from .tasks.columns import Say
from .trainer import RunTrainer

RESAMPLES = 200
COVERED = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Evaluation:
    """Scores by name, and by name their bootstrap samples: the scores of as many rows, drawn with replacement."""

    rows: int
    scores: dict[str, float]
    samples: dict[str, list[float]]

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        return {name: interval(values) for name, values in self.samples.items()}


def interval(samples: list[float]) -> tuple[float, float]:
    """The bootstrap's percentile interval, which covers 95 % (Efron & Tibshirani 1993, chapter 13)."""
    low, high = np.percentile(samples, COVERED).tolist()
    return low, high


def evaluate(
    folder: Path,
    data: Path | None = None,
    say: Say = print,
    callbacks: Iterable[transformers.TrainerCallback] = (),
) -> Evaluation:
    """Evaluate a finished run.

    Args:
        data: more rows, with the columns trained on. None takes the run's test rows, or else its validation rows.
    Raises:
        CheckpointError: no finished run there. DataError: rows that cannot be read.
    """
    found = run.load(folder)
    if data is not None:
        return measure(found, found.task.rows(data, say), callbacks)
    recipe, before = found.recipe, found.recipe.made_with or {}
    for split, hashed in record.hashes(recipe.data.sources).items():
        if hashed != before.get(split):
            say(f"{recipe.data.sources[split]} has changed since the run.")
    _, rows = TASKS[recipe.task].from_data(recipe.data, recipe.model, recipe.seed, lambda _: None)
    split = "test" if "test" in rows else "validation"
    say(f"The {split} rows of the run")
    return measure(found, rows[split], callbacks)


def measure(found: Run, rows: Any, callbacks: Iterable[transformers.TrainerCallback] = ()) -> Evaluation:
    """The scores of encoded rows."""
    task = found.task
    with tempfile.TemporaryDirectory() as scratch:
        trainer = RunTrainer(
            Path(scratch),
            task.metrics,
            write=task.write if task.generates else None,
            model=found.model,
            args=arguments_of(found.recipe.model_copy(update={"output": Path(scratch)})),
            eval_dataset=rows,
            data_collator=task.collate,
            preprocess_logits_for_metrics=task.reduced,
            callbacks=list(callbacks),
        )
        guessed = trainer.predict(rows)
    scores = task.metrics(_part(guessed, slice(None)), rows)
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows["row"] if "row" in rows.column_names else range(len(rows))):
        places.setdefault(row, []).append(place)
    each = list(places.values())
    samples: dict[str, list[float]] = {name: [] for name in scores}
    draws = np.random.default_rng(0).integers(0, len(each), (RESAMPLES, len(each))).tolist()
    for draw in watch.through("Resampling", draws):
        chosen = [place for row in draw for place in each[row]]
        drawn = rows.select(chosen)
        if "row" in rows.column_names:  # a row drawn twice counts as two
            numbers = [number for number, row in enumerate(draw) for _ in each[row]]
            drawn = drawn.remove_columns("row").add_column("row", numbers)
        for name, value in task.metrics(_part(guessed, chosen), drawn).items():
            samples[name].append(value)
    return Evaluation(len(each), scores, samples)


def _part(guessed: Any, chosen: Any) -> transformers.EvalPrediction:
    def part(values: Any) -> Any:
        return tuple(value[chosen] for value in values) if isinstance(values, tuple) else values[chosen]

    return transformers.EvalPrediction(part(guessed.predictions), part(guessed.label_ids))
