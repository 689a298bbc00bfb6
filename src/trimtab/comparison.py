"""Several methods on one recipe's data: each trained in a process of its own, scored on the same rows, in one table.

The learning rate of a method is the recipe's times `relative_rate` of the method over that of the recipe's own. Of
several tries, each `FACTOR` times the one before, the one with the best validation score counts.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import evaluation, record, run, watch
from .arguments import settings_of
from .errors import ConfigError, TrainingError, did_you_mean
from .methods import METHODS
from .recipe import Recipe
from .report import size
from .run import METRICS
from .tasks import TASKS
from .tasks.columns import Say

FACTOR = 4.0
PASSES = 30  # of which the fastest is the latency


@dataclass(frozen=True)
class Trial:
    """One training, of one method."""

    recipe: Recipe

    @property
    def name(self) -> str:
        return self.recipe.output.name

    @property
    def method(self) -> str:
        return str(self.recipe.methods[0]["name"])

    @property
    def rate(self) -> float:
        return float(self.recipe.training["learning_rate"])

    @property
    def seed(self) -> int:
        return self.recipe.seed


@dataclass(frozen=True)
class Row:
    """A method's line, of the best learning rate: means over the seeds; the interval is of all seeds' samples.

    score, low, high: the task's metric and its 95 % interval. seconds: of training. latency: seconds that one row takes
    to go through the model, the least of PASSES. at_the_end: whether the best learning rate was the least or the most
    that was tried, of several. failed: why there are no numbers.
    """

    method: str
    failed: str = ""
    learning_rate: float = 0.0
    at_the_end: bool = False
    score: float = 0.0
    low: float = 0.0
    high: float = 0.0
    trainable_parameters: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    adapter_bytes: int = 0
    latency: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """The rows, best first, and what they are scores of."""

    metric: str
    higher_is_better: bool
    split: str
    rows_scored: int
    baseline: dict[str, float]  # without training
    rows: list[Row]


def methods_of(given: str) -> list[str]:
    """Names of methods, separated by commas; the beginning of a name will do where it is one method's only.

    Raises:
        ConfigError: no such method, or several.
    """
    found = []
    for word in filter(None, (part.strip() for part in given.split(","))):
        meant = [word] if word in METHODS else [name for name in METHODS if name.startswith(word)]
        if len(meant) != 1:
            hint = f" It could be: {', '.join(meant)}." if meant else did_you_mean(word, METHODS)
            raise ConfigError(f"There is no method {word!r}.{hint}")
        found += meant
    if not found:
        raise ConfigError(f"Name methods, of these: {', '.join(METHODS)}.")
    return list(dict.fromkeys(found))


def trials(recipe: Recipe, methods: Iterable[str], tries: int, seeds: Sequence[int], folder: Path) -> list[Trial]:
    """All trainings, method by method."""
    own = "" if isinstance(recipe.method, list) else recipe.method["name"]
    rate = settings_of(recipe)["learning_rate"] / recipe.relative_rate
    found = []
    for method in methods:
        settings = recipe.method if method == own else {"name": method}
        for place in range(tries):
            one = float(f"{rate * METHODS[method].relative_rate * FACTOR ** (place - (tries - 1) // 2):.3g}")
            for seed in seeds:
                training = {**recipe.training, "learning_rate": one, "seed": seed}
                changed = {"method": settings, "training": training, "output": folder / f"{method}-{one:g}-{seed}"}
                found.append(Trial(recipe.model_copy(update=changed)))
    return found


def compare(todo: Sequence[Trial], folder: Path, say: Say = print) -> Comparison:
    """Train what is not trained yet, and compare. Writes comparison.json, comparison.md and comparison.png."""
    folder.mkdir(parents=True, exist_ok=True)
    task = TASKS[todo[0].recipe.task]
    reached: dict[str, dict[float, list[tuple[float, Trial]]]] = {trial.method: {} for trial in todo}
    failed: dict[str, str] = {}
    for trial in watch.through("Comparing", todo):
        if trial.method in failed:
            continue
        if failure := _train(trial):
            failed[trial.method] = failure
            say(f"{trial.name}: {failure}")
            continue
        score = _metrics(trial)["validation"][task.metric]
        say(f"{trial.name}: validation {task.metric} {score:.4g}")
        reached[trial.method].setdefault(trial.rate, []).append((score, trial))
    sign = 1 if task.higher_is_better else -1
    rows = []
    for method, by_rate in reached.items():
        if method in failed:
            rows.append(Row(method, failed[method]))
            continue
        best = max(by_rate, key=lambda rate: sign * statistics.fmean(score for score, _ in by_rate[rate]))
        at_the_end = len(by_rate) > 1 and best in (min(by_rate), max(by_rate))
        rows.append(_measured([trial for _, trial in by_rate[best]], task.metric, at_the_end))
    rows.sort(key=lambda row: (bool(row.failed), -sign * row.score))
    done = next((trial for by_rate in reached.values() for found in by_rate.values() for _, trial in found), None)
    if done is None:
        raise ConfigError(f"None of the methods can be trained. {rows[0].method}: {rows[0].failed}")
    metrics = _metrics(done)
    split = "test" if "test" in metrics else "validation"
    before = metrics["untrained"][split][task.metric]
    baseline = {"before training": before, "without a model": metrics["majority"][split].get(task.metric)}
    found = Comparison(task.metric, task.higher_is_better, split, metrics["rows"][split], baseline, rows)
    (folder / "comparison.json").write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    (folder / "comparison.md").write_text(page(found), encoding="utf-8")
    (folder / "comparison.png").write_bytes(plot(found))
    return found


def _metrics(trial: Trial) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((trial.recipe.output / METRICS).read_text(encoding="utf-8"))
    return found


def _train(trial: Trial) -> str:
    """Train in a process of its own, for its memory is measured; why that failed, or ""."""
    path = trial.recipe.output.with_name(f"{trial.name}.yaml")
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    trial.recipe.write(path)
    if path.read_text(encoding="utf-8") == before:
        if (trial.recipe.output / METRICS).exists():
            return ""
        how = "--resume"
    else:
        how = "--overwrite"
        (trial.recipe.output / METRICS).unlink(missing_ok=True)
    command = [sys.executable, "-m", "trimtab", "train", str(path), how]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode == 2:  # what the user can put right
        return ended.stderr.strip().splitlines()[-1].removeprefix("error: ")
    if ended.returncode:
        raise TrainingError(f"{' '.join(command)} ended with code {ended.returncode}: {ended.stderr.strip()[-2000:]}")
    return ""


def _measured(trials: list[Trial], metric: str, at_the_end: bool) -> Row:
    evaluations = [evaluation.evaluate(trial.recipe.output, say=lambda _: None) for trial in trials]
    low, high = evaluation.interval([value for found in evaluations for value in found.samples[metric]])
    each = [_metrics(trial) for trial in trials]
    return Row(
        method=trials[0].method,
        learning_rate=trials[0].rate,
        at_the_end=at_the_end,
        score=statistics.fmean(found.scores[metric] for found in evaluations),
        low=low,
        high=high,
        trainable_parameters=each[0]["trainable_parameters"],
        seconds=statistics.fmean(metrics["seconds"] for metrics in each),
        peak_memory_bytes=max(metrics["peak_memory_bytes"] for metrics in each),
        adapter_bytes=each[0]["adapter_bytes"],
        latency=_latency(trials[0]),
    )


def _latency(trial: Trial) -> float:
    """Seconds that one row takes through the model: the least of PASSES, for other work only adds to it."""
    found = run.load(trial.recipe.output)
    batch = {name: value[:1] for name, value in found.task.example().items()}
    times = []
    for _ in range(PASSES):
        start = time.perf_counter()
        run.logits(found.model, batch)
        times.append(time.perf_counter() - start)
    return min(times)


HEADS = ("method", "", "95 % interval", "trained", "time", "peak memory", "on disk", "latency", "learning rate")


def table(found: Comparison) -> list[tuple[str, ...]]:
    """A line of headings, and one for each method that was trained."""
    trained = [row for row in found.rows if not row.failed]
    return [(HEADS[0], found.metric, *HEADS[2:]), *map(cells, trained)]


def failures(found: Comparison) -> list[str]:
    """A line for each method that was not."""
    return [f"{row.method} was not trained: {row.failed}" for row in found.rows if row.failed]


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table, in the order of HEADS."""
    return (
        row.method,
        f"{row.score:.4g}",
        f"{row.low:.4g} to {row.high:.4g}",
        f"{row.trainable_parameters:,}",
        f"{row.seconds:.0f} s",
        size(row.peak_memory_bytes),
        size(row.adapter_bytes),
        f"{1000 * row.latency:.1f} ms",
        f"{row.learning_rate:g}{' *' if row.at_the_end else ''}",
    )


def page(found: Comparison) -> str:
    """comparison.md."""
    head, *body = table(found)
    lines = [head, ("---", *["---:"] * (len(HEADS) - 1)), *body]
    shown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    known = ", ".join(f"{name} {value:.4g}" for name, value in found.baseline.items() if value is not None)
    failed = "".join(f"- {line}\n" for line in failures(found))
    chosen = "the validation rows" if found.split == "test" else "these rows, which makes it a little too good"
    better = "more" if found.higher_is_better else "less"
    return f"""\
# Methods compared

{found.metric} on {found.rows_scored:,} {found.split} rows ({better} is better); {known}.

{shown}

{failed}- The interval covers 95 % of the scores of resampled rows, and of the seeds where there are several. Where two
  overlap widely, these rows do not tell which method is better.
- The learning rate was chosen by the score on {chosen}. `*`: the least or the most that was tried.
- time: the training with its evaluations. peak memory: of the whole process. latency: one row through the model, the
  fastest of {PASSES} passes.

![comparison](comparison.png)
"""


def plot(found: Comparison) -> bytes:
    """The scores with their intervals, over the number of trained parameters, and what they cost, as a PNG."""
    from matplotlib.figure import Figure

    rows = [row for row in found.rows if not row.failed]
    costs = {
        "training, s": [row.seconds for row in rows],
        "peak memory, GB": [row.peak_memory_bytes / 1e9 for row in rows],
        "on disk, MB": [row.adapter_bytes / 1e6 for row in rows],
        "latency, ms": [1000 * row.latency for row in rows],
    }
    figure = Figure(figsize=(11, 0.4 * len(rows) + 6), layout="constrained")
    axes = figure.subplot_mosaic([["scores"] * len(costs), list(costs)])
    axes["scores"].set(xscale="log", xlabel="trained parameters", ylabel=f"{found.metric}, {found.split}")
    for row in rows:
        place = (row.trainable_parameters, row.score)
        beside = [[max(row.score - row.low, 0)], [max(row.high - row.score, 0)]]
        axes["scores"].errorbar(*place, yerr=beside, marker="o", capsize=3)
        axes["scores"].annotate(row.method, place, xytext=(5, 5), textcoords="offset points")
    for name, values in costs.items():
        axes[name].barh([row.method for row in rows], values)
        axes[name].invert_yaxis()
        axes[name].set_xlabel(name)
    return record.png(figure)
