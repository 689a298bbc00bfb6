"""Many adapters on one trunk, beside HF PEFT: mixed batches, steps of packed training, and whole trainings.

    python benchmarks/many.py --rounds 7

The model is a Llama of 8 layers of width 512 with random weights, in float32. What is compared takes turns; of the
rounds the medians count. Before anything is timed, losses and outputs of the two must be equal. Written are
docs/benchmarks/many.json and .md.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

import trimtab
from trimtab import many
from trimtab import recipe as recipes

TARGETS = {"query and value": ["q_proj", "v_proj"], "all-linear": "all-linear"}
PACKS = ((4, 64), (16, 16))  # jobs x tokens of each in a step
ROWS, PROMPT, NEW = 16, 8, 32  # of mixed batches: rows, each with its own adapter; tokens given; tokens generated
VOCABULARY = 2048
Times = dict[str, dict[str, Any]]


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        **settings,
    }
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
    )
    return transformers.LlamaForCausalLM(config)


def adapted(model: Any, targets: Any, number: int) -> tuple[Any, list[str]]:
    """The model with so many LoRAs of trimtab's, none of them zero."""
    names = [f"n{i}" for i in range(number)]
    config = trimtab.LoraConfig(r=8, target_modules=targets, init_lora_weights=False)
    trimtab.get_peft_model(model, config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model, names


def theirs(model: Any, ours: Any, names: list[str]) -> Any:
    """HF PEFT's model with the same adapters."""
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        made = peft.PeftModel.from_pretrained(model, Path(folder) / names[0], names[0], is_trainable=True)
        for name in names[1:]:
            made.load_adapter(Path(folder) / name, name)
    return made


def timed(kinds: dict[str, Callable[[], object]], rounds: int) -> Times:
    """What `compared` makes of it, after so many rounds in which the kinds take turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name, act in kinds.items():
            wall, cpu = time.perf_counter(), time.process_time()
            act()
            if number:  # the first warms up
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return compared(found)


def compared(found: dict[str, list[tuple[float, float]]]) -> Times:
    """By kind medians of seconds by the clock and of the processor, and of what they are over those of another kind.

    Over another's in the same round: from one round to the next the machine may be a third quicker or slower.
    """

    def medians(pairs: list[tuple[float, float]]) -> list[float]:
        return [statistics.median(values) for values in zip(*pairs, strict=True)]

    return {
        name: {
            "seconds": medians(own),
            "over": {
                other: medians([(a[0] / b[0], a[1] / b[1]) for a, b in zip(own, its, strict=True)])
                for other, its in found.items()
            },
        }
        for name, own in found.items()
    }


def mixed(targets: Any, rounds: int, **settings: Any) -> dict[str, Times]:
    """Each row of a batch under its own adapter: in `generate`, and in one pass over NEW tokens."""
    base = llama(**settings).eval()
    ours, names = adapted(llama(**settings).eval(), targets, ROWS)
    hf = theirs(llama(**settings).eval(), ours, names).eval()
    ids = torch.randint(3, VOCABULARY, (ROWS, NEW))

    @torch.no_grad()
    def once(model: Any, **chosen: Any) -> Tensor:
        found: Tensor = model(input_ids=ids, **chosen).logits
        return found

    def write(model: Any, **chosen: Any) -> Any:
        wanted = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        start = ids[:, :PROMPT]
        return model.generate(input_ids=start, attention_mask=torch.ones_like(start), **wanted, **chosen)

    torch.testing.assert_close(once(ours, adapter_names=names), once(hf, adapter_names=names), rtol=1e-3, atol=1e-3)
    return {
        what: timed(
            {"base": partial(act, base), "ours": partial(act, ours, adapter_names=names),
             "hf": partial(act, hf, adapter_names=names)}, rounds)
        for what, act in (("generate", write), ("one pass", once))
    }  # fmt: skip


def packed(targets: Any, jobs: int, tokens: int, rounds: int, **settings: Any) -> Times:
    """A training step of each of several jobs: forward, backward, clipping, AdamW."""
    ours, names = adapted(llama(**settings).train(), targets, jobs)
    hf = theirs(llama(**settings).train(), ours, names).train()
    frozen = llama(**settings).requires_grad_(False)
    for model in (ours, hf, frozen):
        model.config.use_cache = False
    ours.set_requires_grad(names)
    ids = torch.randint(3, VOCABULARY, (jobs, tokens))

    def optimizer(model: Any, name: str) -> torch.optim.Optimizer:
        own = [value for path, value in model.named_parameters() if name in path.split(".")]
        return torch.optim.AdamW([value.requires_grad_() for value in own], lr=1e-4, fused=True)

    def step(own: torch.optim.Optimizer) -> None:
        clip_grad_norm_(own.param_groups[0]["params"], 1.0, foreach=True)
        own.step()
        own.zero_grad()

    own, other = ([optimizer(model, name) for name in names] for model in (ours, hf))

    def losses() -> Tensor:
        logits = ours(input_ids=ids).logits[:, :-1].float()
        each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return each.view(jobs, -1).mean(1)

    def together() -> None:
        losses().sum().backward()
        for one in own:
            step(one)

    def one_by_one() -> None:
        for row, (name, one) in enumerate(zip(names, other, strict=True)):
            hf.set_adapter(name)
            hf(input_ids=ids[row : row + 1], labels=ids[row : row + 1]).loss.backward()
            step(one)

    def bound() -> None:
        embeds = frozen.get_input_embeddings()(ids).requires_grad_()
        frozen(inputs_embeds=embeds, labels=ids).loss.backward()

    hf.set_adapter(names[-1])
    expected = hf(input_ids=ids[-1:], labels=ids[-1:]).loss
    with ours.route(names):
        torch.testing.assert_close(losses()[-1], expected, rtol=1e-4, atol=1e-4)
        return timed({"bound": bound, "ours": together, "hf": one_by_one}, rounds)


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<pad>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


class Clock(transformers.TrainerCallback):
    """From the end of a training's second step to that of its last, by the clock and of the processor."""

    def __init__(self) -> None:
        self.began: tuple[float, float] | None = None
        self.ended = (0.0, 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter(), time.process_time()
        self.began = now if state.global_step == 2 else self.began  # the first ones warm up
        self.ended = now

    @property
    def passed(self) -> tuple[float, float]:
        assert self.began is not None
        return self.ended[0] - self.began[0], self.ended[1] - self.began[1]


def trained(targets: Any, jobs: int, tokens: int, steps: int, turns: int, **settings: Any) -> Times:
    """Whole trainings of one row a step: `train_many`, and HF PEFT with transformers' Trainer one after another."""
    plain = {"max_steps": steps, "per_device_train_batch_size": 1, "learning_rate": 1e-4}
    words = torch.randint(3, VOCABULARY, (40, tokens - 2), generator=torch.Generator().manual_seed(0))
    texts = [" ".join(f"w{i - 3}" for i in row) for row in words.tolist()]

    def ours(folder: Path) -> tuple[float, float]:
        (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        found, clock = [], Clock()
        for number in range(jobs):
            path = folder / f"{number}.yaml"
            training = {**plain, "seed": number, "eval_strategy": "no", "save_strategy": "no"}
            recipe = {"task": "text-generation", "model": "model", "data": {"train": "train.jsonl", "validation": 0.1},
                      "method": {"name": "lora", "r": 8, "target_modules": targets}, "training": training,
                      "output": f"run-{number}"}  # fmt: skip
            path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
            found.append(recipes.read(path))
        # All are as long, so the first one's steps are those of all; at its end it goes on to save what it has.
        ranking = many.train_many(
            found, lambda _: None, lambda name: [clock] if name == "run-0" else [], overwrite=True
        )
        assert not many.failures(ranking), many.failures(ranking)
        return clock.passed

    def theirs(folder: Path) -> tuple[float, float]:
        passed = []
        for number in range(jobs):
            model = peft.get_peft_model(llama(**settings), peft.LoraConfig(r=8, target_modules=targets))
            rows = [{"input_ids": row, "labels": row} for row in words]
            arguments = transformers.TrainingArguments(
                folder / "hf", **plain, seed=number, logging_steps=1, report_to="none", save_strategy="no",
                use_cpu=not torch.accelerator.is_available(), disable_tqdm=True,
            )  # fmt: skip
            clock = Clock()
            trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[clock])
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
            passed.append(clock.passed)
        wall, cpu = map(sum, zip(*passed, strict=True))
        return wall, cpu

    with tempfile.TemporaryDirectory() as name:
        llama(**settings).save_pretrained(Path(name) / "model")
        tokenizer(Path(name) / "model")
        taken: dict[str, list[tuple[float, float]]] = {"ours": [], "hf": []}
        for _ in range(turns):
            for kind, whole in (("ours", ours), ("hf", theirs)):
                taken[kind].append(whole(Path(name)))
    return compared(taken)


def main(arguments: list[str] | None = None, **settings: Any) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often each is timed")
    parser.add_argument("--steps", type=int, default=30, help="of whole trainings")
    parser.add_argument("--turns", type=int, default=3, help="how often whole trainings are timed")
    parser.add_argument("--conditions", default="", help="what else is to be known of the machine, for the page")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    asked = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}",
        "conditions": asked.conditions,
        "rounds": asked.rounds,
        "turns": asked.turns,
        "mixed": {name: mixed(targets, asked.rounds, **settings) for name, targets in TARGETS.items()},
        "packed": {
            name: {
                f"{jobs}x{tokens}": packed(targets, jobs, tokens, asked.rounds, **settings) for jobs, tokens in PACKS
            }
            for name, targets in TARGETS.items()
        },
        "trained": {
            name: {
                f"{jobs}x{tokens}": trained(targets, jobs, tokens, asked.steps, asked.turns, **settings)
                for jobs, tokens in PACKS
            }
            for name, targets in TARGETS.items()
        },
    }
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / "many.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (asked.output / "many.md").write_text(page(found), encoding="utf-8")


def page(found: dict[str, Any]) -> str:
    def times(one: Any, kind: str) -> str:
        return " / ".join(f"{1000 * value:.0f}" for value in one[kind]["seconds"])

    def seconds(one: Any, kind: str) -> str:
        return " / ".join(f"{value:.1f}" for value in one[kind]["seconds"])

    def over(one: Any, kind: str, other: str) -> str:
        return " / ".join(f"{value:.2f}" for value in one[kind]["over"][other])

    batches = [
        f"| {targets} | {what} | {times(one, 'base')} | {over(one, 'ours', 'base')} | {over(one, 'hf', 'base')} |"
        for targets, kinds in found["mixed"].items()
        for what, one in kinds.items()
    ]
    steps = [
        f"| {targets} | {size} | {times(one, 'ours')} | {over(one, 'ours', 'bound')} | {over(one, 'hf', 'ours')} |"
        for targets, sizes in found["packed"].items()
        for size, one in sizes.items()
    ]
    whole = [
        f"| {targets} | {size} | {seconds(one, 'ours')} | {seconds(one, 'hf')} | {over(one, 'hf', 'ours')} |"
        for targets, sizes in found["trained"].items()
        for size, one in sizes.items()
    ]
    lines = "\n".join
    return f"""\
# Many adapters on one trunk

`make bench-many` writes this page. {found["machine"]}. {found["conditions"]}

A Llama of 8 layers of width 512 with random weights, float32; LoRAs of rank 8; medians of {found["rounds"]} rounds, in
which what is compared takes turns. Times are by the clock / of the processor.

## Mixed batches

{ROWS} rows, each under its own of {ROWS} adapters: `generate` writes {NEW} tokens after {PROMPT}, and one pass reads
{NEW}.

| LoRA at | | base, ms | ours / base | HF PEFT / base |
| --- | --- | ---: | ---: | ---: |
{lines(batches)}

## A step of packed training

Forward, backward, clipping and AdamW of all jobs; jobs x tokens of each. The bound is the frozen model, forward and the
gradients of activations, on the same batch, without an optimizer. HF PEFT takes the jobs one after another.

| LoRA at | jobs x tokens | ours, ms | ours / bound | HF PEFT / ours |
| --- | --- | ---: | ---: | ---: |
{lines(steps)}

## Whole trainings

`trimtab.many.train_many`, and HF PEFT with transformers' Trainer, one training after another: seconds from the second
step to the last, with all that the Trainers do in between; medians of {found["turns"]}.

| LoRA at | jobs x tokens | ours, s | HF PEFT, s | HF PEFT / ours |
| --- | --- | ---: | ---: | ---: |
{lines(whole)}
"""


if __name__ == "__main__":
    main()
