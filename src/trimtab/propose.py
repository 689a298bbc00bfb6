"""A recipe with comments, from a look at the data and the model's config."""

from pathlib import Path
from typing import Any

import yaml

from . import recipe as recipes
from .errors import TargetError
from .methods.lora import LoraConfig
from .outline import usual_ends
from .tasks import TASKS

STEPS = 500  # that a short training should at least take
BATCH = 16
MOST_EPOCHS = 20


def propose(data: Path, model: str, overrides: list[str]) -> str:
    """The text of a recipe; `overrides` are settings of it that are known, `data.columns.text=review` and the like.

    Raises:
        RecipeError: overrides that are none. DataError: rows that cannot be read, or are for no task. ConfigError: no
        such model.
    """
    output = Path("runs") / data.name.partition(".")[0]
    given = {"model": model, "data": {"train": str(data)}, "method": {"name": "lora"}, "output": str(output)}
    known = recipes.read(Path("proposed recipe"), overrides, text=yaml.safe_dump(given))
    lines: list[str] = []
    task, rows = TASKS[known.task].from_data(known.data, known.model, known.seed, lambda line: lines.append(str(line)))
    lengths = sorted(task.length(row) for row in rows["train"])
    count = task.count(rows["train"])
    epochs = min(max(3, -(-STEPS * BATCH // count)), MOST_EPOCHS)
    report = "\n".join(f"# {line}" for line in [*lines, *_spread(lengths)])
    limit = getattr(task, "max_length", None)
    cut = f"  # max_length: {limit}  # tokens; what is longer is cut\n" if limit else ""
    shown = known.plain()["data"] | {"columns": task.names}
    test = "" if "test" in shown else "  # test: another file, by which nothing is chosen\n"
    rest = "".join(f"  {key}: {_yaml(value)}\n" for key, value in shown.items())
    found = task.outline(known.model)
    method = known.method
    if isinstance(method, dict) and method["name"] == "lora":
        method = {**_method(found), **method}
    return f"""\
# Run it with: trimtab train THIS_FILE
{report}
task: {known.task}
model: {_yaml(known.model)}  # a folder, or an id on the hub
data:  # validation is a file, or the share of the training rows that is set aside
{rest}{test}{cut}method: {_yaml(method)}  # `trimtab methods` lists all of them
quantization: {known.quantization}  # or int8, nf4: the frozen weights in 8 or 4 bits, which takes less memory
training:  # transformers.TrainingArguments' names
  epochs: {epochs}
  batch_size: {BATCH}
  learning_rate: {_rate(found) * known.relative_rate:.2e}
  seed: {known.seed}
  # gradient_accumulation_steps: 4  # batches that make one step, where the memory holds no bigger ones
  # gradient_checkpointing: true  # less memory, more time
  # metric_for_best_model: {task.metric}  # by which a checkpoint is chosen, on the validation rows
output: {_yaml(str(known.output))}
"""


def _method(model: Any) -> dict[str, Any]:
    """LoRA on attention's query and value where these have a known name, else on all layers that are usual targets."""
    method = {"name": "lora", "r": 8}
    try:
        LoraConfig().default_targets(model)
    except TargetError:
        return {**method, "target_modules": usual_ends(model)}
    return method


def _rate(model: Any) -> float:
    """The smaller the model, the higher: LoRA's for GPT-3 and RoBERTa (Hu et al. 2021, tables 9 and 12), and what was
    best for a MiniLM of 23 million parameters (docs/benchmarks/methods.md)."""
    size = sum(parameter.numel() for parameter in model.parameters())
    return 2e-3 if size < 1e8 else 5e-4 if size < 1e9 else 2e-4


def _spread(lengths: list[int]) -> list[str]:
    if lengths[-1] == lengths[0]:
        return []
    return [f"train: lengths {lengths[0]} to {lengths[-1]}, half of them up to {lengths[len(lengths) // 2]}"]


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").strip()
