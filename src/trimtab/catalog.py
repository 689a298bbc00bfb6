"""The table of all methods, read off the methods themselves: nothing about a method is written a second time.

python -m trimtab.catalog docs/methods.md      writes the page
"""

import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from . import attach, optimizers
from .adapter import Adapter, InputAdapter, PeftConfig
from .errors import ConfigError, TargetError
from .methods import METHODS, alora, lora_data, lora_init, union
from .prompts import PromptLearningConfig
from .targets import PartialTargetWarning, TargetConfig

PROBES = {
    "linear": nn.Linear(8, 8),
    "convolution": nn.Conv2d(8, 8, 1),
    "embedding": nn.Embedding(8, 8),
    "norm": nn.LayerNorm(8),
    "any module": nn.Sequential(nn.Linear(8, 8)),
}
INPUT, ATTENTION = "the model's input", "attention"
INTRODUCTION = """\
# Methods

Generated from the methods' own files by `make docs`. `trimtab methods --model MODEL` adds the number of parameters
that each of them trains on your model.
"""

MEASURED = """\
## Measured

On MiniLM and SST-2, after one epoch of 4,000 sentences; a short training, in which methods that begin slowly stay
behind. [benchmarks/methods.md](benchmarks/methods.md) says how; `make bench-methods SST2=FOLDER` makes it.
"""


# What has no row in the table: title, whose text, and the lines of an example that differ.
BESIDE = (
    (
        "Unions of methods",
        union,
        'prefix = trimtab.PrefixTuningConfig(num_virtual_tokens=10, task_type="SEQ_CLS")\n'
        "model = trimtab.get_peft_model(model, [prefix, trimtab.LoraConfig()])",
    ),
    (
        "LoRA's starts from the weight",
        lora_init,
        'model = trimtab.get_peft_model(model, trimtab.LoraConfig(init_lora_weights="pissa"))',
    ),
    (
        "LoRA's starts from data",
        lora_data,
        'config = trimtab.LoraConfig(init_lora_weights="corda", task_type="SEQ_CLS")\n'
        "trimtab.preprocess_corda(model, config, lambda: model(torch.tensor([[5, 6, 7, 8]])))\n"
        "model = trimtab.get_peft_model(model, config)",
    ),
    (
        "aLoRA",
        alora,
        "model = trimtab.get_peft_model(model, trimtab.LoraConfig(alora_invocation_tokens=[5, 6]))",
    ),
    (
        "LoRA+ and LoRA-FA",
        optimizers,
        "model = trimtab.get_peft_model(model, trimtab.LoraConfig())\n"
        "optimizer = trimtab.optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, "
        "loraplus_lr_ratio=16)",
    ),
)


@dataclass(frozen=True)
class Entry:
    """What there is to know of a method."""

    name: str
    config: type[PeftConfig]
    title: str  # LoRA
    paper: str
    formula: str  # the whole text at the top of its file, without the title
    fits: str
    merges: bool

    @property
    def latency(self) -> str:
        if self.merges:
            return "none once merged"
        if self.fits == ATTENTION:
            return "attention to more tokens"
        return "a longer input" if self.fits == INPUT else "small layers at each site"


def entries() -> list[Entry]:
    return [_entry(name, config) for name, config in METHODS.items()]


def trainable(config: type[PeftConfig], model: nn.Module) -> int | str:
    """How many parameters the method trains on this model with its example settings, or why it cannot."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", PartialTargetWarning)
            made = attach.plan(model, config(**config.example), "default")
    except (ConfigError, TargetError) as error:
        return str(error)
    found = {
        id(parameter): parameter.numel() for adapter in made.adapters.values() for parameter in adapter.parameters()
    }
    return sum(found.values())


def table(model: nn.Module | None = None) -> list[tuple[str, ...]]:
    """A line of headings, and one for each method."""
    lines = [("method", "trains", *(("trainable",) if model else ()), "merges", "fits", "extra latency", "paper")]
    for entry in entries():
        count = trainable(entry.config, model) if model else 0
        shown = (f"{count:,}" if isinstance(count, int) else "does not fit",) if model else ()
        merges = "yes" if entry.merges else "no"
        lines.append((entry.name, entry.config.trains, *shown, merges, entry.fits, entry.latency, entry.paper))
    return lines


def page(benchmark: str) -> str:
    """docs/methods.md, with the table of docs/benchmarks/methods.md."""
    first, *rest = table()
    lines = [first, tuple("---" for _ in first), *rest]
    measured = "".join(line for line in benchmark.splitlines(keepends=True) if line.startswith("|"))
    parts = [INTRODUCTION, "".join(f"| {' | '.join(line)} |\n" for line in lines), MEASURED, measured]
    more = [_beside(*found) for found in BESIDE]
    return "\n".join([*parts, *(_section(entry) for entry in entries()), *more])


def _beside(title: str, module: ModuleType, code: str) -> str:
    text = (module.__doc__ or "").strip()
    imports = "import torch, transformers, trimtab, trimtab.optimizers"
    load = 'model = transformers.AutoModelForSequenceClassification.from_pretrained("my-model")'
    return f"## {title}\n\n```text\n{text}\n```\n\n```python\n{imports}\n\n{load}\n{code}\n```\n"


def _section(entry: Entry) -> str:
    settings = ", ".join(f"{key}={value!r}" for key, value in entry.config.example.items())
    code = [
        "import transformers, trimtab",
        "",
        'model = transformers.AutoModelForSequenceClassification.from_pretrained("my-model")',
        f"model = trimtab.get_peft_model(model, trimtab.{entry.config.__name__}({settings}))",
        "model.print_trainable_parameters()",
    ]
    text = [f"## {entry.title}\n", f"{entry.paper}\n" if entry.paper else "", f"```text\n{entry.formula}\n```\n"]
    text += [f"**When to use it.** {entry.config.when}\n"]
    text += [f"**Strengths and weaknesses.** {entry.config.evidence}\n"]
    return "\n".join([part for part in text if part] + ["```python", *code, "```\n"])


def _entry(name: str, config: type[PeftConfig]) -> Entry:
    text = (sys.modules[config.__module__].__doc__ or "").strip()
    start = re.match(r"([^(:]+?)(?: \((.*?)\))?[:.] *(.*)", text, re.S)
    assert start is not None, f"{config.__module__} says nothing of itself"
    kind = _adapter(config)
    merges = kind.merged not in (Adapter.merged, InputAdapter.merged)
    return Entry(name, config, start[1], start[2] or "", start[3].strip(), _fits(config), merges)


def _adapter(config: type[PeftConfig]) -> type[Adapter]:
    """The class of the adapters that the config makes."""
    if not issubclass(config, TargetConfig):
        return InputAdapter
    found = config.build.__annotations__["return"]
    if found is Adapter:  # of one class or another: see which
        example = config(**config.example)
        found = type(next(example.build("probe", module) for module in PROBES.values() if example.fits(module)))
    assert isinstance(found, type)
    return found


def _fits(config: type[PeftConfig]) -> str:
    if not issubclass(config, TargetConfig):
        return INPUT if issubclass(config, PromptLearningConfig) else ATTENTION
    example = config(**config.example)
    assert isinstance(example, TargetConfig)
    return ", ".join(kind for kind, module in PROBES.items() if example.fits(module))


if __name__ == "__main__":
    written, benchmark = map(Path, sys.argv[1:])
    written.write_text(page(benchmark.read_text(encoding="utf-8")), encoding="utf-8")
