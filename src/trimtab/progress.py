"""Long steps on the terminal: a bar with the time left for each, and a line for each evaluation of a training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from . import watch


class ProgressBar(TrainerCallback):
    """Shows a training that it is a callback of, and all that `watch` tells from now on. A pipe gets no bars."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        note = TextColumn("{task.fields[note]}")
        hidden = console.quiet or not console.is_interactive
        self.bar = Progress(*columns, TimeElapsedColumn(), note, console=console, transient=True, disable=hidden)
        self.steps = self.bar.add_task("Training", visible=False, note="")
        self.batches = self.bar.add_task("Evaluating", visible=False, note="")
        watch.shown.set(self.step)

    @contextmanager
    def step(self, what: str, total: int | None) -> Iterator[Callable[[], object]]:
        one = self.bar.add_task(what, total=total, note="")
        self.bar.start()
        try:
            yield lambda: self.bar.advance(one)
        finally:
            self.bar.remove_task(one)
            self._rest()

    def _rest(self) -> None:
        """Clear the terminal where nothing is left to show."""
        if not any(task.visible for task in self.bar.tasks):
            self.bar.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.reset(self.steps, total=state.max_steps, completed=state.global_step, visible=True)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.update(self.steps, note=f"loss {logs['loss']:.3f}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.batches, total=len(kwargs["eval_dataloader"]), visible=True, advance=1)
        self.bar.start()

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self.bar.reset(self.batches, visible=False, note="")
        self._rest()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.reset(self.batches, visible=False, note="")
        metrics = kwargs["metrics"]
        shown = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
        scores = ", ".join(
            f"{name} {value:.3f}" for name, value in shown.items() if not name.endswith(("time", "per_second"))
        )
        self.console.print(f"epoch {state.epoch:.3g}, validation: {scores}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.steps, visible=False)
        self._rest()
