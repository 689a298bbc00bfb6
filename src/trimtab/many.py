"""Several recipes trained at once over one frozen base (lockstep.py), and sweeps: one recipe in many variants."""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import transformers
import yaml

from . import recipe as reading
from . import record
from .arguments import settings_of
from .errors import ConfigError, TrimtabError
from .lockstep import Job, Lockstep
from .recipe import Recipe
from .run import METRICS, RECIPE
from .tasks import TASKS
from .tasks.columns import Say
from .training import Result, flat, train

RANKING = "ranking.json"
CURVES = "losses.png"
PRECISION = ("bf16", "fp16")


@dataclass(frozen=True)
class Outcome:
    """What became of one recipe: a result, or why there is none."""

    name: str
    recipe: Recipe
    result: Result | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Ranking:
    """Outcomes from the best to the worst by a metric of the validation rows; what failed is at the end.

    shared: of the jobs' calls of the base in training, the share that was computed together with others'.
    """

    metric: str
    outcomes: list[Outcome]
    shared: float


def train_many(
    recipes: Sequence[Recipe],
    say: Say = print,
    callbacks: Callable[[str], Iterable[transformers.TrainerCallback]] = lambda _: (),
    resume: bool = False,
    overwrite: bool = False,
    at_once: int | None = None,
    ended: Callable[[str, Exception | None], None] = lambda *_: None,
) -> Ranking:
    """Train several recipes at once, over one base. Each gives what `train` gives for it alone, in its own folder.

    They may differ in all but the base model, its quantization, the precision and the task. One that fails stops alone,
    and is in the ranking with its error.

    Args:
        say: gets lines, each with the name of its recipe (of the output folder) before it.
        callbacks: for the Trainer of the recipe of a name.
        resume: go on with those that did not finish, leave those that did as they are, and begin the others.
        overwrite: throw unfinished runs away, which otherwise are refused.
        at_once: how many are trained at a time, all by default; where one ends the next one joins the others.
        ended: told when the recipe of a name has come to its end, or to an error.
    Raises:
        ConfigError: recipes that cannot share a base, or that have one output folder.
    """
    check(recipes)
    lockstep = Lockstep()
    named = dict(zip(names_of(recipes), recipes, strict=True))
    results = {name: found for name, recipe in named.items() if resume and (found := _finished(recipe))}
    failed: dict[str, Exception] = {}
    told: set[str] = set()

    def tell(name: str, line: Any) -> None:
        if str(line) not in told:  # what holds for all is said once
            told.add(str(line))
            say(f"{name}: {line}")

    def run(name: str, job: Job) -> Result:
        recipe = named[name]
        if recipe.training.get("neftune_noise_alpha"):
            job.alone = "its noise goes on the input of a model's own embeddings"
            tell(name, f"computed by itself, without the others: {job.alone}")
        try:
            result = train(recipe, partial(tell, name), callbacks(name), resume, overwrite, job=job)
        except Exception as error:
            ended(name, error)
            raise
        ended(name, None)
        return result

    todo = [name for name in named if name not in results]
    for name, job in zip(todo, lockstep.run([partial(run, name) for name in todo], at_once), strict=True):
        if job.error is None:
            results[name] = job.result
        elif isinstance(job.error, TrimtabError | OSError):
            failed[name] = job.error
        else:
            raise job.error
    outcomes = [Outcome(name, recipe, results.get(name), failed.get(name)) for name, recipe in named.items()]
    task = TASKS[recipes[0].task]
    sign = -1 if task.higher_is_better else 1
    outcomes.sort(key=lambda one: sign * one.result.metrics["validation"][task.metric] if one.result else float("inf"))
    calls = lockstep.shared + lockstep.apart
    return Ranking(task.metric, outcomes, lockstep.shared / max(calls, 1))


def _finished(recipe: Recipe) -> Result | None:
    """What this recipe came to, if its run is there to the end."""
    if not all((recipe.output / name).is_file() for name in (METRICS, RECIPE)):
        return None
    written = dict(flat(yaml.safe_load((recipe.output / RECIPE).read_text(encoding="utf-8"))))
    if any(written.get(key) != value for key, value in flat(recipe.plain()) if value is not None):
        return None
    return Result(recipe.output, json.loads((recipe.output / METRICS).read_text(encoding="utf-8")))


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


def variants(path: Path, overrides: Sequence[str], varied: Sequence[str], say: Say = print) -> list[Recipe]:
    """A recipe with every combination of values, such as method.r=4,8 and training.seed=0,1.

    The output folders are named for the values, in one beside the recipe's own, with -sweep behind its name.

    Raises:
        ConfigError: nothing is varied, or not as KEY=VALUE,VALUE. RecipeError: as reading a recipe does.
    """
    choices = []
    for one in varied:
        key, equals, values = one.partition("=")
        each = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", values)]  # commas in lists do not count
        if not equals or not all(each) or len(set(each)) != len(each):
            raise ConfigError(f"--vary {one}: write KEY=VALUE,VALUE, such as training.learning_rate=1e-4,3e-4.")
        choices.append([f"{key.strip()}={value}" for value in each])
    if not choices:
        raise ConfigError("Nothing is varied. Write what is: --vary method.r=4,8,16")
    folder = reading.read(path, overrides, say).output
    folder = folder.with_name(f"{folder.name}-sweep")
    found = []
    for chosen in itertools.product(*choices):
        name = ",".join(f"{one.partition('=')[0].rpartition('.')[2]}={one.partition('=')[2]}" for one in chosen)
        name = re.sub(r"[^\w.,=+-]+", "_", name)
        found.append(reading.read(path, [*overrides, *chosen, f"output={folder / name}"], lambda _: None))
    return found


def table(ranking: Ranking) -> list[tuple[str, ...]]:
    """A line of headings, and one for each recipe that was trained, best first."""
    lines: list[tuple[str, ...]] = [("", ranking.metric, "loss", "trained", "steps", "learning rate")]
    for one in ranking.outcomes:
        if one.result is not None:
            metrics = one.result.metrics
            scores = metrics["validation"]
            lines.append((
                one.name, f"{scores[ranking.metric]:.4g}", f"{scores['loss']:.4g}",
                f"{metrics['trainable_parameters']:,}", str(metrics["steps"]),
                f"{settings_of(one.recipe)['learning_rate']:g}",
            ))  # fmt: skip
    return lines


def failures(ranking: Ranking) -> list[str]:
    """A line for each recipe that was not trained to its end."""
    return [f"{one.name} was not trained: {one.error}" for one in ranking.outcomes if one.error is not None]


def write(ranking: Ranking, folder: Path) -> None:
    """ranking.json, and losses.png: the training losses of all recipes by step."""
    lines = [
        {"name": one.name, "output": str(one.recipe.output), **({"error": str(one.error)} if one.error else {})}
        | ({"validation": one.result.metrics["validation"]} if one.result else {})
        for one in ranking.outcomes
    ]
    found = {"metric": ranking.metric, "shared": ranking.shared, "recipes": lines}
    (folder / RANKING).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (folder / CURVES).write_bytes(_curves(ranking))


def _curves(ranking: Ranking) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="training loss")
    for one in ranking.outcomes:
        points = [(line["step"], line["loss"]) for line in record.read(one.recipe.output / record.HISTORY)
                  if "loss" in line]  # fmt: skip
        if points:
            axes.plot(*zip(*points, strict=True), label=one.name, linewidth=1)
    axes.legend(fontsize="small")
    return record.png(figure)


def folder_of(recipes: Sequence[Recipe]) -> Path:
    """Where the ranking of recipes lies: in the folder that all their output folders are in."""
    return Path(os.path.commonpath([recipe.output.absolute().parent for recipe in recipes]))
