"""Training: what a run leaves behind, when it stops, and how the two trainers read checkpoints."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml
from conftest import review, write_csv, write_recipe
from safetensors.torch import load_file
from torch import Tensor, nn

from trimtab import LoraConfig, PeftModel, Trainer, files, get_peft_model, run, training
from trimtab import recipe as recipes
from trimtab.errors import CheckpointError, ConfigError, RecipeError, TargetError, TrainingError, TrimtabError
from trimtab.trainer import RunTrainer, last_checkpoint
from trimtab.training import train


def silent(line: str) -> None:
    pass


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / files.WEIGHTS)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def changed(recipe: Path, *overrides: str) -> recipes.Recipe:
    return recipes.read(recipe, overrides)


# A whole run


def test_a_run_leaves_all_that_prediction_needs(recipe: Path, bert: Path) -> None:
    said: list[str] = []
    result = train(changed(recipe), said.append)
    assert {path.name for path in result.folder.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "history.jsonl", "loss.png", "metrics.json",
        "recipe.yaml", "report.html", "task.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert "train: 24 rows read, 24 kept" in said
    assert json.loads((result.folder / "metrics.json").read_text()) == result.metrics
    assert result.metrics["rows"] == {"train": 18, "validation": 6, "test": 8}
    assert result.metrics["steps"] == 6  # 18 rows, 6 a step, 2 epochs
    # query and value of 2 layers, each A (2, 64) and B (64, 2); the head's copy, (2, 64) and (2,)
    assert result.metrics["trainable_parameters"] == 2 * 2 * 2 * 2 * 64 + 2 * 64 + 2
    assert result.metrics["adapter_bytes"] == (result.folder / files.WEIGHTS).stat().st_size
    assert result.metrics["majority"]["test"]["accuracy"] == 0.5
    saved = json.loads((result.folder / files.CONFIG).read_text())
    assert (saved["task_type"], saved["base_model_name_or_path"]) == ("SEQ_CLS", str(bert))


def test_a_run_learns(recipe: Path) -> None:
    metrics = train(changed(recipe, "training.epochs=8", "method.r=8"), silent).metrics
    assert metrics["test"]["loss"] < metrics["untrained"]["test"]["loss"]
    assert metrics["untrained"]["test"]["accuracy"] < 1
    assert metrics["test"]["accuracy"] == 1


def test_the_same_recipe_gives_the_same_adapter(recipe: Path) -> None:
    first = saved(train(changed(recipe), silent).folder)
    assert same(first, saved(train(changed(recipe, "output=again"), silent).folder))
    assert not same(first, saved(train(changed(recipe, "training.seed=1"), silent).folder))


def test_the_written_recipe_gives_the_same_adapter(recipe: Path) -> None:
    first = train(changed(recipe), silent).folder
    again = train(recipes.read(first / "recipe.yaml", [f"output={first.parent / 'again'}"]), silent).folder
    assert same(saved(first), saved(again))
    assert yaml.safe_load((first / "recipe.yaml").read_text())["data"]["columns"] == {"text": "text", "label": "label"}


def test_training_again_into_a_folder_replaces_the_run(recipe: Path) -> None:
    folder = train(changed(recipe), silent).folder
    before = saved(folder)
    (folder / "checkpoints" / "checkpoint-999").mkdir(parents=True)  # of a run that was killed while it wrote this
    train(changed(recipe, "training.seed=1"), silent)
    assert not same(saved(folder), before)
    assert not (folder / "checkpoints").exists()


def test_what_is_loaded_predicts_what_was_trained(recipe: Path) -> None:
    found = run.load(train(changed(recipe, "training.epochs=8", "method.r=8"), silent).folder)
    answers = found.task.predict(found.model, ["the film was good", "the film was bad"])
    assert [answer["label"] for answer in answers] == ["praise", "blame"]
    assert all(sum(answer["probabilities"].values()) == pytest.approx(1) for answer in answers)


def test_a_saved_adapter_that_predicts_otherwise_is_an_error(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = run.load

    def damaged(folder: Path) -> run.Run:
        found = load(folder)
        with torch.no_grad():
            found.model.classifier.adapters["default"].replacement.bias += 0.01
        return found

    monkeypatch.setattr(run, "load", damaged)
    with pytest.raises(CheckpointError, match="does not predict what was trained"):
        train(changed(recipe), silent)


def test_accumulated_gradients_are_those_of_the_whole_batch(recipe: Path, bert: Path, tmp_path: Path) -> None:
    """Adam and clipping would hide a wrong scale; plain descent shows it."""
    settings = json.loads((bert / "config.json").read_text(encoding="utf-8"))
    still = settings | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shutil.copytree(bert, tmp_path / "still")
    (tmp_path / "still" / "config.json").write_text(json.dumps(still), encoding="utf-8")
    plain = [
        f"model={tmp_path / 'still'}",
        "training.optim=sgd",
        "training.warmup_steps=0",
        "training.max_grad_norm=1e9",
    ]
    parts = ["training.batch_size=2", "training.gradient_accumulation_steps=3", "output=parts"]
    whole = saved(train(changed(recipe, *plain, "training.batch_size=6"), silent).folder)
    accumulated = saved(train(changed(recipe, *plain, *parts), silent).folder)
    for name, value in whole.items():
        torch.testing.assert_close(accumulated[name], value, rtol=1e-5, atol=1e-5)


def test_gradients_are_clipped_by_the_norm_of_all_that_is_trained(recipe: Path) -> None:
    """A step of plain descent is as long as its rate times the bound: two differ by the rates' difference times it."""
    plain = ["training.optim=sgd", "training.warmup_steps=0", "training.max_steps=1", "training.max_grad_norm=0.001"]
    one, two = (
        saved(train(changed(recipe, *plain, f"training.learning_rate={rate}", f"output=run-{rate}"), silent).folder)
        for rate in (1, 3)
    )
    moved = torch.stack([(two[name] - one[name]).norm() for name in one]).norm().item()
    assert moved == pytest.approx(0.002, rel=1e-4)


def test_bfloat16_training_passes_its_own_check(recipe: Path) -> None:
    assert train(changed(recipe, "training.bf16=true"), silent).metrics["steps"] == 6


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_base_is_trained_and_loaded_again(recipe: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    folder = train(changed(recipe, f"quantization={quantization}"), silent).folder
    found = run.load(folder)
    assert type(found.model.bert.encoder.layer[0].attention.self.query.weight).__name__ in ("Int8Params", "Params4bit")
    assert type(found.model.classifier.weight) is nn.Parameter


# When a run stops


def test_steps_instead_of_epochs(recipe: Path) -> None:
    settings = ["training.max_steps=3", "training.eval_strategy=steps", "training.eval_steps=2"]
    assert train(changed(recipe, *settings), silent).metrics["steps"] == 3


def test_without_evaluation_in_between_the_end_is_still_measured(recipe: Path) -> None:
    assert "accuracy" in train(changed(recipe, "training.eval_strategy=no"), silent).metrics["validation"]


def test_a_loss_that_is_no_number_stops_the_run(recipe: Path) -> None:
    with pytest.raises(TrainingError, match=r"is (nan|inf) in step \d+. Try a lower training.learning_rate"):
        train(changed(recipe, "training.learning_rate=1e30", "training.warmup_steps=0"), silent)
    assert not (recipe.parent / "run" / files.WEIGHTS).exists()


def test_weights_that_do_not_change_are_an_error(recipe: Path) -> None:
    with pytest.raises(TrainingError, match="changed no weight"):
        train(changed(recipe, "training.learning_rate=1e-300"), silent)


@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        ("method.target_modules=[query, valeu]", ConfigError, r"target_modules: \['valeu'\] match no module"),
        ("method.target_modules=[valeu]", TargetError, "Closest: value"),
        ("method.modules_to_save=[pooller]", ConfigError, r"modules_to_save: \['pooller'\] match no module"),
        ("training.metric_for_best_model=acuracy", ConfigError, "there is no 'acuracy'. Did you mean 'accuracy'"),
        ("training.lr_scheduler_kwargs={foo: 1}", ConfigError, "training: .* unexpected keyword argument 'foo'"),
        ("training.lr_scheduler_type=cosine_with_min_lr", ConfigError, "training: .*min_lr"),
        ("training.optim=adamw_anyprecision", ConfigError, "training: .*torchdistx"),
        ("training.save_strategy=steps", ConfigError, "training: "),
        ("training.logging_steps=.inf", RecipeError, "a finite number"),
        ("output=.", ConfigError, "output folder .* holds no run, but recipe.yaml. Name another"),
        ('output="\\0"', ConfigError, "output folder .* cannot be made: embedded null byte"),
        ("output=train.csv", ConfigError, "output folder .* cannot be made"),
        ("output=train.csv/x", ConfigError, "output folder .* cannot be made"),
    ],
)
def test_what_cannot_work_is_said_before_training(
    recipe: Path, override: str, kind: type[TrimtabError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "train", lambda _: pytest.fail("training started"))
    with pytest.raises(kind, match=message):
        train(changed(recipe, override), silent)


def test_a_bad_batch_is_kept(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Trainer.compute_loss

    def blank(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss, outputs = compute(self, model, inputs, *args, **kwargs)
        return loss * (0 if self.state.global_step == 2 else 1), outputs

    monkeypatch.setattr(Trainer, "compute_loss", blank)
    with pytest.raises(TrainingError, match=r"The loss is exactly 0, .* in step 3\. .*bad_batch\.safetensors"):
        train(changed(recipe), silent)
    batch = load_file(recipe.parent / "run" / "bad_batch.safetensors")
    assert batch["input_ids"].shape[0] == 6
    assert set(batch["labels"].tolist()) <= {0, 1}


def test_the_longest_batch_comes_first(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(recipe.parent / "train.csv", [*map(review, range(24)), ("good " * 20, "praise"), ("bad " * 24, "blame")])
    seen: list[tuple[int, ...]] = []
    compute = Trainer.compute_loss

    def noted(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            seen.append(tuple(inputs["input_ids"].shape))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", noted)
    alone = saved(train(changed(recipe, "data.validation=test.csv"), silent).folder)
    assert seen[0] == (6, 26)
    monkeypatch.setattr(RunTrainer, "try_longest", lambda *_: None)
    assert same(alone, saved(train(changed(recipe, "data.validation=test.csv"), silent).folder))

    def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "compute_loss", full)
    with pytest.raises(TrainingError, match=r"longest batch, 6 rows of up to 26\. Halve training.batch_size"):
        train(changed(recipe, "data.validation=test.csv"), silent)


# Going on after a break

SETTINGS = ["training.epochs=3", "training.eval_strategy=steps", "training.eval_steps=2", "method.lora_dropout=0.5"]
PLACES = {
    "in a step": ("RunTrainer.training_step", 6),
    "before the checkpoint's state": ("transformers.trainer_callback.TrainerState.save_to_json", 3),
    "before the first checkpoint": ("RunTrainer.training_step", 2),
    "before the adapter is saved": ("TextClassification.save", 1),
}
KILL = """
import os, signal, sys, transformers
from pathlib import Path
from trimtab import kernels, recipe, training
from trimtab.cli.quiet import quiet
from trimtab.tasks import TASKS
from trimtab.trainer import RunTrainer

place, calls, path, *overrides = sys.argv[1:]
quiet()
kernels.FEW = 0  # as conftest.py has it, so that both runs draw the same dropout
TextClassification = TASKS["text-classification"]
owner, name = place.rsplit(".", 1)
owner, left = eval(owner), int(calls)
original = getattr(owner, name)

def killed(*args, **kwargs):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, name, killed)
training.train(recipe.read(Path(path), overrides), str)
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = write_recipe(tmp_path_factory.mktemp("unbroken"), bert)
    result = train(changed(path, *SETTINGS), silent)
    return saved(result.folder), result.metrics


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_goes_on_to_the_same_bits(recipe: Path, unbroken: Any, place: str) -> None:
    where, calls = PLACES[place]
    command = [sys.executable, "-c", KILL, where, str(calls), str(recipe), *SETTINGS]
    assert subprocess.run(command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == -9
    checkpoints = last_checkpoint(recipe.parent / "run" / "checkpoints")
    if place == "before the first checkpoint":
        assert checkpoints is None
    else:
        with pytest.raises(CheckpointError, match=r"holds an unfinished run, \d steps of it. Go on .*--resume"):
            train(changed(recipe, *SETTINGS), silent)
        with pytest.raises(CheckpointError, match=r"training.learning_rate was 0.01 and is 0.02. Change it back"):
            train(changed(recipe, *SETTINGS, "training.learning_rate=0.02"), silent, resume=True)
        write_csv(recipe.parent / "test.csv", [review(i) for i in range(25, 33)])
        with pytest.raises(CheckpointError, match=r"made_with.test was \w+ and is \w+"):
            train(changed(recipe, *SETTINGS), silent, resume=True)
        write_csv(recipe.parent / "test.csv", [review(i) for i in range(24, 32)])
    said: list[str] = []
    if place == "before the adapter is saved":  # its folder is enough
        path, settings = recipe.parent / "run" / "checkpoints" / "recipe.yaml", ()
    else:
        path, settings = recipe, SETTINGS
    result = train(changed(path, *settings), lambda line: said.append(str(line)), resume=True)
    weights, metrics = unbroken
    assert same(saved(result.folder), weights)
    assert {name: value for name, value in result.metrics.items() if name not in ("seconds", "peak_memory_bytes")} == {
        name: value for name, value in metrics.items() if name not in ("seconds", "peak_memory_bytes")
    }
    steps = [json.loads(line)["step"] for line in (result.folder / "history.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 10))
    assert steps == sorted(steps)
    assert any("Going on after" in line for line in said) is (checkpoints is not None)
    for line in said:  # "Going on after 6 of 9 steps; 3 are left."
        if line.startswith("Going on after"):
            done, total, left = map(int, re.findall(r"\d+", line))
            assert total == metrics["steps"]
            assert done + left == total


LIMITED = """
import resource, sys
from trimtab.cli import main

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)  # as on a full disk
main(sys.argv[2:])
"""


@pytest.mark.parametrize("limit", [3_000, 9_000])  # in the first checkpoint; in a later file of it
def test_a_disk_that_is_full_costs_nothing_that_was_saved(recipe: Path, limit: int, unbroken: Any) -> None:
    first = train(changed(recipe, "training.epochs=1"), silent)
    before = saved(first.folder)
    command = [sys.executable, "-c", LIMITED, str(limit), "train", str(recipe), "--set", "training.epochs=2"]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 2, ended.stderr
    [line] = ended.stderr.splitlines()
    assert re.match(r"error: .*run cannot be written to: .*make room, and go on", line)
    assert same(saved(first.folder), before)
    assert run.load(first.folder)
    train(changed(recipe, "training.epochs=2"), silent, resume=True)
    assert not same(saved(first.folder), before)


def test_an_adapter_that_changes_no_prediction_is_no_result(recipe: Path) -> None:
    """B of LoRA leaves zero, but by less than a float32 of the outputs can show."""
    with pytest.raises(TrainingError, match="changes no prediction"):
        train(changed(recipe, "training.epochs=1", "training.learning_rate=1e-20"), silent)


def test_an_adapter_may_act_in_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here in the last of 20 only: the first ones alone would say that it never acts."""
    model = SimpleNamespace(adapter=1.0)

    @contextmanager
    def without() -> Iterator[None]:
        model.adapter = 0.0
        yield
        model.adapter = 1.0

    model.disable_adapter = without
    task: Any = SimpleNamespace(collate=lambda rows: torch.tensor(rows))
    monkeypatch.setattr("trimtab.training.run.logits", lambda model, rows: rows * model.adapter)
    assert not training._acting(model, task, [0.0] * 19 + [1.0]).any()
    with pytest.raises(TrainingError, match="changes no prediction"):
        training._acting(model, task, [0.0] * 20)


EACH_STEP = ("eval_strategy=steps", "save_strategy=steps", "eval_steps=1", "metric_for_best_model=loss")


@pytest.mark.parametrize(
    "wanted", [["learning_rate=1"], ["learning_rate=0.05", "save_steps=2", *EACH_STEP]], ids=["an early one", "saved"]
)
def test_validation_scores_are_of_the_adapter_that_is_kept(recipe: Path, wanted: list[str]) -> None:
    """They were taken in training, when its checkpoint was written; those of the test rows are taken at the end.

    Not the last checkpoint is the best one, at so high a rate; and the best step is one that is not saved.
    """
    settings = changed(recipe, "training.epochs=4", *(f"training.{one}" for one in wanted))
    update = {"data": settings.data.model_copy(update={"validation": settings.data.test})}
    metrics = train(settings.model_copy(update=update), silent).metrics
    assert metrics["validation"] == pytest.approx(metrics["test"], rel=1e-6)


def test_an_unfinished_run_can_be_thrown_away(recipe: Path, unbroken: Any) -> None:
    (recipe.parent / "run" / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (recipe.parent / "run" / "checkpoints" / "checkpoint-2" / "trainer_state.json").write_text("{}")
    result = train(changed(recipe, *SETTINGS), silent, overwrite=True)
    assert same(saved(result.folder), unbroken[0])


# Merge


def test_merging_gives_a_plain_model_with_equal_outputs(recipe: Path, tmp_path: Path) -> None:
    folder = train(changed(recipe), silent).folder
    assert run.merge(folder, tmp_path / "merged") < 1e-5
    found = run.load(folder)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert type(plain).__name__ == "BertForSequenceClassification"
    texts = [review(i)[0] for i in range(6)]
    for one, other in zip(found.task.predict(plain, texts), found.task.predict(found.model, texts), strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_a_merge_that_changes_outputs_leaves_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.errors import MergeError

    folder = train(changed(recipe), silent).folder
    monkeypatch.setattr(PeftModel, "merge_and_unload", PeftModel.unload)  # drops the adapter instead
    with pytest.raises(MergeError, match="Nothing was saved"):
        run.merge(folder, tmp_path / "merged")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("merged")]


# Checkpoints: transformers' Trainer saves those of adapters but reads only full models', and HF PEFT's


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([2, 5 + i, 6, 3]), "labels": torch.tensor(i % 2)}


def adapted(bert: Path) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))


def trainer(kind: type[transformers.Trainer], model: Any, folder: Path, **settings: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        str(folder), **{"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.01, "report_to": "none",
        "dataloader_pin_memory": False, "disable_tqdm": True, **settings},
    )  # fmt: skip
    return kind(model, arguments, train_dataset=Rows(), eval_dataset=Rows())


def values(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if "adapters" in name}


def test_resuming_is_exact(bert: Path, tmp_path: Path) -> None:
    through = adapted(bert)
    trainer(Trainer, through, tmp_path, save_steps=2).train()
    resumed = adapted(bert)
    with torch.no_grad():
        for value in values(resumed).values():
            value.fill_(7)  # what the checkpoint does not restore shows
    trainer(Trainer, resumed, tmp_path, save_steps=2).train(str(tmp_path / "checkpoint-2"))
    assert same(values(resumed), values(through))


def test_plain_trainer_does_not_find_the_checkpoint_of_an_adapter(bert: Path, tmp_path: Path) -> None:
    trainer(transformers.Trainer, adapted(bert), tmp_path, save_steps=2).train()
    assert (tmp_path / "checkpoint-2" / files.WEIGHTS).is_file()
    with pytest.raises(ValueError, match="Can't find a checkpoint index"):
        trainer(transformers.Trainer, adapted(bert), tmp_path).train(str(tmp_path / "checkpoint-2"))


def worse_and_worse(kind: type[transformers.Trainer], model: Any, folder: Path) -> transformers.Trainer:
    """A trainer whose first checkpoint is its best."""
    settings = {"save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "metric_for_best_model": "score"}
    made = trainer(kind, model, folder, load_best_model_at_end=True, **settings)
    made.compute_metrics = lambda _: {"score": -float(made.state.global_step)}
    return made


def test_the_best_checkpoint_is_loaded_at_the_end(bert: Path, tmp_path: Path) -> None:
    model = adapted(bert)
    worse_and_worse(Trainer, model, tmp_path).train()
    assert (tmp_path / "checkpoint-4").is_dir()
    first = PeftModel.from_pretrained(
        transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2), tmp_path / "checkpoint-1"
    )
    assert same(values(model), values(first))
    assert model.active_adapters == ["default"]


def test_plain_trainer_cannot_load_the_best_checkpoint(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin"):
        worse_and_worse(transformers.Trainer, adapted(bert), tmp_path).train()


def test_several_adapters_resume_each_from_its_own_folder(bert: Path, tmp_path: Path) -> None:
    def two() -> Any:
        model = adapted(bert)
        model.add_adapter("second", LoraConfig(r=4, target_modules=["key"]))
        model.set_adapter(["default", "second"])
        return model

    through = two()
    trainer(Trainer, through, tmp_path, save_steps=2).train()
    resumed = two()
    trainer(Trainer, resumed, tmp_path, save_steps=2).train(str(tmp_path / "checkpoint-2"))
    assert same(values(resumed), values(through))


def test_a_model_without_adapters_is_left_to_transformers(bert: Path, tmp_path: Path) -> None:
    def plain() -> Any:
        torch.manual_seed(0)
        return transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)

    through, resumed, best = plain(), plain(), plain()
    trainer(Trainer, through, tmp_path / "a", save_steps=2).train()
    trainer(Trainer, resumed, tmp_path / "a", save_steps=2).train(str(tmp_path / "a" / "checkpoint-2"))
    assert same(resumed.state_dict(), through.state_dict())
    worse_and_worse(Trainer, best, tmp_path / "b").train()
    assert same(best.state_dict(), load_file(tmp_path / "b" / "checkpoint-1" / "model.safetensors"))


def test_rows_are_the_same_whatever_the_split_order(recipe: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "dev.csv", [review(i) for i in range(40, 46)])
    metrics = train(changed(recipe, "data.validation=dev.csv"), silent).metrics
    assert metrics["rows"] == {"train": 24, "validation": 6, "test": 8}
