"""Several trainings on the terminal at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers import TrainerCallback


@dataclass
class Line:
    """What is known of one of several trainings."""

    state: str = "preparing"
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
        self.shown = console.is_interactive

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

    def ended(self, name: str, error: Exception | None) -> None:
        self.lines[name].state = "failed" if error else "done"

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
        self.line.state = "checking" if self.line.step else "preparing"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.line.state = "checking"
