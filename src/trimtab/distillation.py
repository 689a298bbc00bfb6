"""The teacher of a run: a model that reads what the student reads, and tells the same classes or tokens apart."""

from pathlib import Path
from typing import Any

import torch

from . import run
from .errors import ConfigError
from .objective import Distillation, Teacher
from .tasks import Task, models


def load(settings: Distillation, task: Task, dtype: torch.dtype, device: torch.device) -> Teacher:
    """The teacher, ready to teach this task: a model with a head for it, or a run of it.

    Raises:
        ConfigError: it is of another task, would need a new head, reads otherwise, or knows other classes.
    """
    name = settings.teacher
    if (Path(name) / run.RECIPE).is_file():
        found = run.load(Path(name))
        if type(found.task) is not type(task):
            raise ConfigError(f"The teacher {name} was trained for {found.recipe.task}, which is another task.")
        model, reader = found.model, found.task.reader
    else:
        pad = getattr(task.reader, "pad_token_id", None)
        model, fresh = models.load(task.auto, name, "none", {}, pad, str(dtype).removeprefix("torch."))
        if fresh:
            raise ConfigError(f"The teacher {name} has not learned this task: its {', '.join(fresh)} would be new. "
                              "Train it first, and name the folder of that run.")  # fmt: skip
        reader = task.load_reader(name)
    if _reading(reader) != _reading(task.reader):
        raise ConfigError(f"The teacher {name} reads otherwise than the model: their tokens, or how files are turned "
                          "into numbers, differ. Name a teacher of the same family.")  # fmt: skip
    more = set(getattr(reader, "model_input_names", ())) - set(getattr(task.reader, "model_input_names", ()))
    if more and len(task.names) > 2:  # of a single text they would say nothing
        raise ConfigError(f"The teacher {name} reads {', '.join(more)}, which the model's tokenizer does not give.")
    return Teacher(settings, model.to(device).eval().requires_grad_(False), _order(name, model, task))


def _reading(reader: Any) -> list[Any]:
    """What two readers have in common that give the same numbers: a vocabulary, or settings."""
    parts = [getattr(reader, name) for name in ("tokenizer", "feature_extractor") if hasattr(reader, name)] or [reader]
    return [part.get_vocab() if hasattr(part, "get_vocab") else part.to_dict() for part in parts]


def _order(name: str, model: Any, task: Task) -> list[int] | None:
    """The numbers that the task's classes have in the teacher, where there are classes."""
    wanted: list[str] | None = getattr(task, "labels", None)
    if wanted is None:
        return None
    number = {label: i for i, label in model.config.id2label.items()}
    if set(number) != set(wanted):
        raise ConfigError(f"The teacher {name} knows the classes {', '.join(sorted(number))}; those of the data are "
                          f"{', '.join(wanted)}. Name them alike, in its config.json or in the data.")  # fmt: skip
    return [number[label] for label in wanted]
