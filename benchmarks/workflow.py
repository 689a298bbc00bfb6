"""`trimtab train` beside a script of HF PEFT's with `transformers.Trainer`: scores and processor time, seed by seed.

    python benchmarks/workflow.py MODELS DATA [--seeds 0,1]

MODELS holds minilm (a BERT) and smollm2 (a causal model); DATA holds wnut17/{train,dev}.jsonl.gz with tokens and tags,
quotes/{train,test}.jsonl.gz with quote, and cifar10_small/{train,test}.zip with a folder for each class. Both get the
same rows, model, targets, rank, learning rate, schedule, batches and epochs, score after each epoch and keep the best
checkpoint. The time is of the whole process, imports included. The table is written to docs/benchmarks/workflow.md.
"""

import argparse
import gzip
import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

RANK, ALPHA = 8, 16
BATCH = 8
COMMON = {"num_train_epochs": 2, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": 32,
          "lr_scheduler_type": "linear", "warmup_steps": 0.1}  # fmt: skip
# By task: the metric, the rows of the files that are trained and scored on, the learning rate, the targets.
TASKS: dict[str, dict[str, Any]] = {
    "token-classification": {"metric": "f1", "rows": (800, 400), "rate": 2e-3, "targets": ["query", "value"]},
    "text-generation": {"metric": "perplexity", "rows": (120, 60), "rate": 1e-3, "targets": ["q_proj", "v_proj"]},
    "image-classification": {"metric": "accuracy", "rows": (600, 300), "rate": 2e-3, "targets": ["fc1", "fc2"]},
}


def prepared(models: Path, data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """By task its model and files, with as many rows as TASKS says."""
    found = {}
    for task, name, files, column in (
        ("token-classification", "wnut17", ("train", "dev"), "tokens"),
        ("text-generation", "quotes", ("train", "test"), "quote"),
    ):
        paths = []
        for file, size in zip(files, TASKS[task]["rows"], strict=True):
            with gzip.open(data / name / f"{file}.jsonl.gz", "rt", encoding="utf-8") as packed:
                rows = [line for line in packed if json.loads(line)[column]][:size]
            paths.append(folder / f"{name}-{file}.jsonl")
            paths[-1].write_text("".join(rows), encoding="utf-8")
        model = models / ("minilm" if task == "token-classification" else "smollm2")
        found[task] = {"model": str(model.resolve()), "train": str(paths[0]), "test": str(paths[1])}
    photos = {"model": _vit(folder / "vit")}
    for split, size in zip(("train", "test"), TASKS["image-classification"]["rows"], strict=True):
        with zipfile.ZipFile(data / "cifar10_small" / f"{split}.zip") as packed:
            names = sorted(name for name in packed.namelist() if not name.endswith("/"))
            packed.extractall(folder / split, names[:: len(names) // size])
        inside = [path for path in (folder / split).iterdir() if path.is_dir()]
        photos[split] = str(inside[0] if len(inside) == 1 else folder / split)
    return {**found, "image-classification": photos}


def _vit(folder: Path) -> str:
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(0)
    ViTModel(
        ViTConfig(
            image_size=32,
            patch_size=4,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
        )
    ).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def script(task: str, given: dict[str, str], seed: int, output: str) -> float:
    """What one writes by hand: the score that it ends with."""
    import datasets
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.set_seed(seed)
    setting = TASKS[task]
    make = {"token-classification": _tags, "text-generation": _texts, "image-classification": _images}[task]
    model, rows, collate, metrics, reduced = make(given, datasets, transformers)
    kind = {"token-classification": "TOKEN_CLS", "text-generation": "CAUSAL_LM"}.get(task)
    saved = ["classifier"] if kind is None else None
    model = get_peft_model(
        model,
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=setting["targets"], task_type=kind, modules_to_save=saved),
    )
    arguments = transformers.TrainingArguments(
        output, **COMMON, learning_rate=setting["rate"], seed=seed, eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model=setting["metric"], label_names=["labels"],
        greater_is_better=setting["metric"] != "perplexity", report_to="none", remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, data_collator=collate, train_dataset=rows["train"], eval_dataset=rows["test"],
        compute_metrics=metrics, preprocess_logits_for_metrics=reduced,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(output)
    return float(trainer.evaluate()[f"eval_{setting['metric']}"])


def _read(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _tags(given: dict[str, str], datasets: Any, transformers: Any) -> Any:
    from seqeval.metrics import f1_score

    found = {split: _read(given[split]) for split in ("train", "test")}
    names = sorted({tag for row in found["train"] for tag in row["tags"]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(given["model"])

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        read = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=512)
        words = read.word_ids()
        labels = [
            names.index(row["tags"][word]) if word is not None and word != before else -100
            for word, before in zip(words, [None, *words], strict=False)
        ]
        return {**read, "labels": labels}

    def metrics(result: Any) -> dict[str, float]:
        truth = [[names[i] for i in row if i != -100] for row in result.label_ids]
        guess = [
            [names[g] for g, i in zip(guessed, row, strict=True) if i != -100]
            for guessed, row in zip(result.predictions, result.label_ids, strict=True)
        ]
        return {"f1": float(f1_score(truth, guess, zero_division=0))}

    rows = {split: datasets.Dataset.from_list([encoded(row) for row in part]) for split, part in found.items()}
    model = transformers.AutoModelForTokenClassification.from_pretrained(given["model"], num_labels=len(names))
    collate = transformers.DataCollatorForTokenClassification(tokenizer)
    return model, rows, collate, metrics, lambda logits, _: logits.argmax(-1)


def _texts(given: dict[str, str], datasets: Any, transformers: Any) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(given["model"])

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        ids = [*tokenizer(row["quote"]).input_ids, tokenizer.eos_token_id][:512]
        return {"input_ids": ids}

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, True, tokenizer.pad_token_id or 0),
            "attention_mask": pad([torch.ones_like(one) for one in ids], True, 0),
            "labels": pad(ids, True, -100),
        }

    def reduced(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
        )
        return torch.stack([each.sum(-1), (labels[:, 1:] != -100).sum(-1)], -1)

    def metrics(result: Any) -> dict[str, float]:
        loss, tokens = np.asarray(result.predictions).sum(0)
        return {"perplexity": math.exp(loss / tokens)}

    rows = {
        split: datasets.Dataset.from_list([encoded(row) for row in _read(given[split])]) for split in ("train", "test")
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(given["model"], dtype="auto")
    return model, rows, collate, metrics, reduced


def _images(given: dict[str, str], datasets: Any, transformers: Any) -> Any:
    from PIL import Image

    processor = transformers.AutoImageProcessor.from_pretrained(given["model"], backend="pil")
    names = sorted(path.name for path in Path(given["train"]).iterdir())
    rows = {
        split: datasets.Dataset.from_list(
            [
                {"file": str(file), "label": names.index(file.parent.name)}
                for file in sorted(Path(given[split]).glob("*/*"))
            ]
        )
        for split in ("train", "test")
    }

    def collate(part: list[dict[str, Any]]) -> dict[str, Any]:
        read = processor([Image.open(row["file"]).convert("RGB") for row in part], return_tensors="pt")
        return {**read, "labels": torch.tensor([row["label"] for row in part])}

    def metrics(result: Any) -> dict[str, float]:
        return {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())}

    model = transformers.AutoModelForImageClassification.from_pretrained(given["model"], num_labels=len(names))
    return model, rows, collate, metrics, None


def recipe(task: str, given: dict[str, str], seed: int, output: str) -> dict[str, Any]:
    setting = TASKS[task]
    columns = {"columns": {"text": "quote"}} if task == "text-generation" else {}
    return {
        "task": task,
        "model": given["model"],
        "data": {"train": given["train"], "validation": given["test"], **columns},
        "method": {"name": "lora", "r": RANK, "lora_alpha": ALPHA, "target_modules": setting["targets"]},
        "training": {**COMMON, "learning_rate": setting["rate"], "seed": seed},
        "output": output,
    }


def measured(command: list[str]) -> tuple[str, float]:
    """What a process writes, and the seconds of processor time that it takes."""
    with tempfile.TemporaryFile() as written, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=written, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        for file in (written, errors):
            file.seek(0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed: {errors.read().decode()[-2000:]}")
        return written.read().decode(), used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--script", help=argparse.SUPPRESS)  # one training by HF PEFT, in a process of its own
    given = parser.parse_args()
    if given.script:
        print(json.dumps(script(**json.loads(given.script))))
        return
    lines = []
    seeds = given.seeds.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        files = prepared(given.models, given.data, Path(scratch))
        for task, setting in TASKS.items():
            for seed in map(int, seeds):
                at = f"{scratch}/{task}-{seed}"
                asked = json.dumps({"task": task, "given": files[task], "seed": seed, "output": f"{at}-hf"})
                said, theirs = measured([sys.executable, __file__, ".", ".", "--script", asked])
                score = json.loads(said.splitlines()[-1])
                Path(f"{at}.yaml").write_text(json.dumps(recipe(task, files[task], seed, at)), encoding="utf-8")
                _, ours = measured([sys.executable, "-m", "trimtab", "train", f"{at}.yaml"])
                own = json.loads(Path(at, "metrics.json").read_text(encoding="utf-8"))["validation"][setting["metric"]]
                lines.append(
                    f"| {task} | {setting['metric']} | {seed} | {score:.3f} | {own:.3f} | {theirs:.0f} | {ours:.0f} |"
                )
                print(lines[-1], flush=True)
    Path("docs/benchmarks/workflow.md").write_text(page(lines), encoding="utf-8")


def page(lines: list[str]) -> str:
    sizes = ", ".join(f"{task} {train} and {test}" for task, (train, test) in
                      ((task, setting["rows"]) for task, setting in TASKS.items()))  # fmt: skip
    table = "\n".join(lines)
    return f"""\
# A recipe beside a script

LoRA (r {RANK}, alpha {ALPHA}) by `trimtab train`, and by a script with HF PEFT and `transformers.Trainer`: equal rows,
models, targets, learning rates and schedules, batches of {BATCH}, {COMMON["num_train_epochs"]} epochs, the best kept.
Rows trained on and scored: {sizes}.
Seconds are processor time of the whole process.
Both score three times: the script after each epoch and at the end, ours before training and after each epoch, for at
the end it has the best checkpoint's scores already. Ours also tries the longest batch first, and loads what it saved to
check it, which the script does not. Each time is of one run, on a machine with other work: they vary by a third.
Made by `benchmarks/workflow.py`.

| task | metric | seed | HF PEFT | trimtab | HF PEFT, s | trimtab, s |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
{table}
"""


if __name__ == "__main__":
    main()
