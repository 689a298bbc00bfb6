"""A training run on the terminal: one bar with the time left, and a line for each evaluation."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
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
