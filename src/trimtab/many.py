"""Several recipes trained at once over one frozen base (lockstep.py), and sweeps: one recipe in many variants."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import transformers

from .errors import ConfigError, TrimtabError
from .lockstep import Job, Lockstep
from .recipe import Recipe
from .tasks import TASKS
from .tasks.columns import Say
from .training import Result, train

RANKING = "ranking.json"
CURVES = "losses.png"
PRECISION = ("bf16", "fp16")


@dataclass(frozen=True)
class Outcome:
    """What became of one recipe: a result, or why there is none."""

    recipe: Recipe
    result: Result | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Ranking:
    """Outcomes from the best to the worst by a metric of the validation rows, those that failed at the end.

    shared: the share of the jobs' calls of the base in training that were computed together with others'.
    """

    metric: str
    outcomes: list[Outcome]
    shared: float


def train_many(
    recipes: Sequence[Recipe],
    say: Say = print,
    callbacks: Callable[[Recipe], Iterable[transformers.TrainerCallback]] = lambda _: (),
    resume: bool = False,
    overwrite: bool = False,
) -> Ranking:
    """Train several recipes at once. What each gives is what `train` gives for it alone, in its own output folder.

    They may differ in all but the base model, its quantization, the precision and the task. What fails is in the
    ranking with its error, and does the others no harm.

    Args:
        say: gets lines, with the name of the output folder before them.
        callbacks: for the Trainer of a recipe.
        resume, overwrite: as for `train`. With resume a job without an unfinished run begins, unless it is done.
    Raises:
        ConfigError: recipes that cannot share a base, or that have one output folder.
    """
    check(recipes)
    names = names_of(recipes)
    lockstep = Lockstep()

    def run(recipe: Recipe, name: str, job: Job) -> Result:
        if recipe.training.get("neftune_noise_alpha"):
            job.alone = "neftune_noise_alpha"
        told = partial(_named, say, name)
        return train(recipe, told, callbacks(recipe), resume, overwrite, job=job)

    jobs = lockstep.run(partial(run, recipe, name) for recipe, name in zip(recipes, names, strict=True))
    outcomes = [Outcome(recipe, job.result, job.error) for recipe, job in zip(recipes, jobs, strict=True)]
    for outcome in outcomes:
        if outcome.error is not None and not isinstance(outcome.error, TrimtabError | OSError):
            raise outcome.error
    task = TASKS[recipes[0].task]
    done = [outcome for outcome in outcomes if outcome.result]
    done.sort(key=lambda one: one.result.metrics["validation"][task.metric], reverse=task.higher_is_better)  # type: ignore[union-attr]
    calls = lockstep.shared + lockstep.apart
    return Ranking(task.metric, [*done, *(one for one in outcomes if not one.result)], lockstep.shared / max(calls, 1))


def _named(say: Say, name: str, line: Any) -> None:
    say(f"{name}: {line}")


def check(recipes: Sequence[Recipe]) -> None:
    """Raise a ConfigError where recipes cannot be trained at once."""
    if not recipes:
        raise ConfigError("There is no recipe to train.")
    first = recipes[0]
    for other in recipes[1:]:
        for what, one, two in (
            ("base model", first.model, other.model),
            ("task", first.task, other.task),
            ("quantization", first.quantization, other.quantization),
            *((key, first.training.get(key, False), other.training.get(key, False)) for key in PRECISION),
        ):
            if one != two:
                raise ConfigError(
                    f"{first.output.name} and {other.output.name} cannot be trained at once: their {what} differs, "
                    f"{one} and {two}. Recipes share one base, loaded once, and one kind of loss."
                )
    folders = [recipe.output.absolute() for recipe in recipes]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ConfigError(f"Two recipes write to {folder}. Give each an output folder of its own.")


def names_of(recipes: Sequence[Recipe]) -> list[str]:
    """Short names: of the output folders the last parts that tell them apart."""
    for length in itertools.count(1):
        names = ["/".join(recipe.output.absolute().parts[-length:]) for recipe in recipes]
        if len(set(names)) == len(names):
            return names
    raise AssertionError
