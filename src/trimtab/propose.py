"""From a look at the data and the model's config: which task they are for, and a recipe to start from."""

from pathlib import Path
from typing import Any

import transformers
import yaml

from .errors import ConfigError, DataError, TargetError, TrimtabError
from .methods.lora import LoraConfig
from .outline import usual_ends
from .tasks import TASKS, Data, Task
from .tasks.models import loading

STEPS = 500  # that a short training should at least take
BATCH = 16
MOST_EPOCHS = 20


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


def recipe(data: Path, model: str, output: Path) -> str:
    """A recipe with comments.

    Raises:
        DataError: rows that cannot be read, or are for no task. ConfigError: no such model.
    """
    files = Data(train=data.absolute())
    name = task_of(files, model)
    lines: list[str] = []
    task, rows = TASKS[name].from_data(files, model, 0, lambda line: lines.append(str(line)))
    lengths = sorted(task.length(row) for row in rows["train"])
    count = task.count(rows["train"])
    epochs = min(max(3, -(-STEPS * BATCH // count)), MOST_EPOCHS)
    report = "\n".join(f"# {line}" for line in [*lines, *_spread(lengths)])
    limit = getattr(task, "max_length", None)
    cut = f"  # max_length: {limit}  # tokens; what is longer is cut\n" if limit else ""
    found = task.outline(model)
    return f"""\
# Run it with: trimtab train THIS_FILE
{report}
task: {name}
model: {_yaml(_absolute(model))}  # a folder, or an id on the hub
data:
  train: {_yaml(str(files.train))}
  validation: 0.1  # the share of the training rows that is set aside, or a file
  # test: another file, by which nothing is chosen
  columns: {_yaml(task.names)}
{cut}method: {_method(found)}  # `trimtab methods` lists all of them
quantization: none  # or int8, nf4: the frozen weights in 8 or 4 bits, which takes less memory
training:  # transformers.TrainingArguments' names
  epochs: {epochs}
  batch_size: {BATCH}
  learning_rate: {_rate(found)}
  seed: 0
  # gradient_accumulation_steps: 4  # batches that make one step, where the memory holds no bigger ones
  # gradient_checkpointing: true  # less memory, more time
  # metric_for_best_model: {task.metric}  # by which a checkpoint is chosen, on the validation rows
output: {_yaml(str(output.absolute()))}
"""


def run_folder(data: Path) -> Path:
    """Where a run of these data goes if nobody says."""
    return Path("runs") / data.name.partition(".")[0]


def _fits(config: Any, task: type[Task]) -> bool:
    return type(config) in getattr(transformers, task.auto)._model_mapping


def _method(model: Any) -> str:
    """LoRA on attention's query and value where these have a known name, else on all layers that are usual targets."""
    method = {"name": "lora", "r": 8}
    try:
        LoraConfig().default_targets(model)
    except TargetError:
        return _yaml({**method, "target_modules": usual_ends(model)})
    return _yaml(method)


def _rate(model: Any) -> str:
    """The smaller the model, the higher: LoRA's for GPT-3 and RoBERTa (Hu et al. 2021, tables 9 and 12), and what was
    best for a MiniLM of 23 million parameters (docs/benchmarks/methods.md)."""
    size = sum(parameter.numel() for parameter in model.parameters())
    return "2.0e-3" if size < 1e8 else "5.0e-4" if size < 1e9 else "2.0e-4"


def _spread(lengths: list[int]) -> list[str]:
    if lengths[-1] == lengths[0]:
        return []
    return [f"train: lengths {lengths[0]} to {lengths[-1]}, half of them up to {lengths[len(lengths) // 2]}"]


def _absolute(model: str) -> str:
    folder = Path(model).expanduser()
    return str(folder.absolute()) if folder.is_dir() else model


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").strip()
