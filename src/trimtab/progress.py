"""A training run on the terminal: one bar with the time left, and a line for each evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        note = TextColumn("{task.fields[note]}")
        self.bar = Progress(*columns, note, console=console, transient=True, disable=not console.is_terminal)
        self.steps = self.bar.add_task("Training", visible=False, note="")
        self.batches = self.bar.add_task("Evaluating", visible=False, note="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.start()
        self.bar.update(self.steps, total=state.max_steps, visible=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.update(self.steps, note=f"loss {logs['loss']:.3f}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.start()
        self.bar.update(self.batches, total=len(kwargs["eval_dataloader"]), visible=True, advance=1)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self.bar.stop()
        self.bar.reset(self.batches, visible=False, note="")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.reset(self.batches, visible=False, note="")
        metrics = kwargs["metrics"]
        shown = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
        scores = ", ".join(
            f"{name} {value:.3f}" for name, value in shown.items() if not name.endswith(("time", "per_second"))
        )
        self.console.print(f"epoch {state.epoch:.3g}, validation: {scores}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()
        self.bar.update(self.steps, visible=False)


@dataclass
class Line:
    """What is known of one of several trainings."""

    state: str = "waiting"
    step: int = 0
    steps: int = 0
    loss: str = ""
    rate: str = ""
    score: str = ""


class Board:
    """Several trainings on the terminal: a table that changes as they go on."""

    def __init__(self, console: Console, names: Sequence[str], metric: str) -> None:
        self.lines = {name: Line() for name in names}
        self.metric = metric
        self.live = Live(console=console, get_renderable=self.table, refresh_per_second=4)
        self.shown = console.is_terminal

    def table(self) -> Table:
        found = Table("", "state", "step", "loss", "learning rate", f"validation {self.metric}", box=None)
        for name, line in self.lines.items():
            steps = f"{line.step}/{line.steps}" if line.steps else ""
            found.add_row(name, line.state, steps, line.loss, line.rate, line.score)
        return found

    def __enter__(self) -> "Board":
        if self.shown:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def callbacks(self, name: str) -> list[TrainerCallback]:
        """What a Trainer tells its line of the table."""
        return [Watch(self.lines[name], self.metric)]


class Watch(TrainerCallback):
    def __init__(self, line: Line, metric: str) -> None:
        self.line, self.metric = line, metric

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.line.state, self.line.steps = "training", state.max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.line.step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.line.loss, self.line.rate = f"{logs['loss']:.4f}", f"{logs.get('learning_rate', 0):.3g}"

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.line.state = "evaluating"

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.line.score = f"{kwargs['metrics'][f'eval_{self.metric}']:.4f}"
        self.line.state = "training"

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        if self.line.state != "trained":
            self.line.state = "waiting"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.line.state = "trained"
