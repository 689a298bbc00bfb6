"""Which task data and a model are for, from the columns of the one and the config of the other."""

from typing import Any

import transformers

from .errors import ConfigError, DataError, TrimtabError
from .tasks import TASKS, Data, Task
from .tasks.models import loading


def task_of(data: Data, model: str) -> str:
    """The task that the model can do and whose columns the rows have; of several the one with the most columns.

    Raises:
        DataError: rows that cannot be read, or have the columns of no such task. ConfigError: no such model.
    """
    with loading(model):
        config = transformers.AutoConfig.from_pretrained(model)
    able = {name: task for name, task in TASKS.items() if _fits(config, task)}
    if not able:
        raise ConfigError(f"{model} is a {config.model_type} model, for which there is no task: {', '.join(TASKS)}.")
    found: dict[str, int] = {}
    failures: dict[str, TrimtabError] = {}
    for name, task in able.items():
        try:
            rows = task.read(data.train, "train", lambda _: None)
            columns = task.named(rows, data)
        except TrimtabError as error:
            failures[name] = error
            continue
        if reason := task.unsuited(rows, columns):
            failures[name] = DataError(reason)
        else:
            found[name] = len(columns)
    if found:
        return max(found, key=lambda name: found[name])
    if len({str(error) for error in failures.values()}) == 1:
        raise next(iter(failures.values()))
    reasons = " ".join(f"{name}: {error}" for name, error in failures.items())
    raise DataError(f"{data.train}: these rows are for none of the tasks that {model} can do. {reasons}")


def _fits(config: Any, task: type[Task]) -> bool:
    return type(config) in getattr(transformers, task.auto)._model_mapping
