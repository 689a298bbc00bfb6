"""Training strategies from a recipe: when a run stops, how its learning rate goes, noise, memory, what is minimized."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from trimtab import AdaLoraConfig, LoraConfig, PromptTuningConfig, files, get_peft_model
from trimtab import recipe as recipes
from trimtab.arguments import arguments_of
from trimtab.errors import ConfigError
from trimtab.objective import Objective, class_weights
from trimtab.tasks.text_classification import TextClassification
from trimtab.trainer import RunTrainer
from trimtab.training import Result, planned, train


def silent(line: str) -> None:
    pass


def changed(recipe: Path, *overrides: str) -> recipes.Recipe:
    return recipes.read(recipe, overrides)


def saved(result: Result) -> dict[str, Tensor]:
    return load_file(result.folder / files.WEIGHTS)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5, msg=name)


def history(result: Result, key: str) -> list[float]:
    lines = (result.folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)[key] for line in lines if key in json.loads(line)]


class BrokenError(Exception):
    pass


class Break(transformers.TrainerCallback):
    """Ends a run as if it were killed, in the step of this number or, with None, when training is over."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise BrokenError

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step is None:
            raise BrokenError


def broken_and_resumed(recipe: recipes.Recipe, step: int | None) -> Result:
    with pytest.raises(BrokenError):
        train(recipe, silent, [Break(step)])
    return train(recipe, silent, resume=True)


@pytest.fixture
def still(tmp_path: Path, bert: Path) -> str:
    """An override: the tiny BERT without dropout."""
    shutil.copytree(bert, tmp_path / "still")
    settings = json.loads((bert / "config.json").read_text(encoding="utf-8"))
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "still" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return f"model={tmp_path / 'still'}"


# When a run stops: 18 rows, 6 a step, 3 steps an epoch

STANDSTILL = ["training.epochs=6", "training.learning_rate=1e-7"]  # the score stays as it is


@pytest.mark.parametrize(("patience", "epochs"), [(1, 2), (2, 3), (5, 6)])
def test_a_run_stops_when_nothing_gets_better(recipe: Path, patience: int, epochs: int) -> None:
    """The first evaluation sets the best score; `patience` more without a better one end the run."""
    result = train(changed(recipe, *STANDSTILL, f"training.early_stopping_patience={patience}"), silent)
    assert result.metrics["steps"] == 3 * epochs


def test_a_threshold_makes_small_progress_none(recipe: Path) -> None:
    """The loss of the rows that are trained on falls from epoch to epoch, by less than 1."""
    settings = [
        "data.validation=train.csv",
        "training.metric_for_best_model=loss",
        "training.early_stopping_patience=1",
    ]
    assert train(changed(recipe, *settings, "training.epochs=4"), silent).metrics["steps"] == 16
    above = ["training.epochs=4", "training.early_stopping_threshold=1"]
    assert train(changed(recipe, *settings, *above), silent).metrics["steps"] == 8


@pytest.mark.parametrize("step", [7, None], ids=["while counting", "after stopping"])
def test_early_stopping_counts_on_after_a_break(recipe: Path, step: int | None) -> None:
    settings = [*STANDSTILL, "training.early_stopping_patience=2"]
    through = train(changed(recipe, *settings, "output=through"), silent)
    resumed = broken_and_resumed(changed(recipe, *settings), step)
    assert resumed.metrics["steps"] == through.metrics["steps"] == 9
    assert same(saved(resumed), saved(through))


# How the learning rate goes

RATES = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "constant_with_warmup": lambda _: 1.0,
}


@pytest.mark.parametrize("schedule", RATES)
def test_schedules_with_warmup(recipe: Path, schedule: str) -> None:
    """r(t) = r_max t / w up to step w, then r_max f((t - w) / (T - w))."""
    settings = [f"training.lr_scheduler_type={schedule}", "training.warmup_ratio=0.5", "training.epochs=4"]
    found = history(train(changed(recipe, *settings), silent), "learning_rate")
    expected = [t / 6 if t < 6 else RATES[schedule]((t - 6) / 6) for t in range(12)]
    assert found == pytest.approx([0.01 * value for value in expected])


PLATEAU = [
    *STANDSTILL,
    "training.lr_scheduler_type=reduce_lr_on_plateau",
    "training.lr_scheduler_kwargs={factor: 0.5, patience: 0, eps: 0}",
]


def test_the_rate_falls_where_the_score_stands_still(recipe: Path) -> None:
    """After the first evaluation the score is the best yet; each later one halves the rate."""
    result = train(changed(recipe, *PLATEAU, "output=through"), silent)
    expected = [1e-7 * factor for factor in (1, 1, 0.5, 0.25, 0.125, 0.0625) for _ in range(3)]
    assert history(result, "learning_rate") == pytest.approx(expected)
    resumed = broken_and_resumed(changed(recipe, *PLATEAU), 10)
    assert history(resumed, "learning_rate") == history(result, "learning_rate")
    assert same(saved(resumed), saved(result))


@pytest.mark.parametrize(("metric", "mode"), [("loss", "min"), ("accuracy", "max"), ("eval_f1_macro", "max")])
def test_a_plateau_knows_which_scores_are_better(recipe: Path, metric: str, mode: str) -> None:
    settings = arguments_of(changed(recipe, *PLATEAU, f"training.metric_for_best_model={metric}"))
    assert settings.lr_scheduler_kwargs == {"factor": 0.5, "patience": 0, "eps": 0, "mode": mode}


# Noise on embeddings (NEFTune, arXiv 2310.05914): uniform in (-1, 1), times alpha / sqrt(L d)


class Heard(transformers.TrainerCallback):
    """Notes what the embeddings gave beside their rows of the table, and whether the model was in training."""

    def __init__(self) -> None:
        self.found: list[tuple[bool, float, float]] = []
        self.model: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.model = model
        model.get_input_embeddings().register_forward_hook(self.hear)

    def hear(self, module: Any, args: Any, result: Tensor) -> None:
        rows = torch.nn.functional.embedding(args[0], module.weight)
        bound = 5 / math.sqrt(result.shape[1] * result.shape[2])
        self.found.append((module.training, (result - rows).abs().max().item(), bound))


@pytest.mark.parametrize("method", ["{name: lora, r: 2}", "{name: prompt_tuning, num_virtual_tokens: 2}"])
def test_noise_is_added_in_training_only(recipe: Path, method: str) -> None:
    heard = Heard()
    train(changed(recipe, f"method={method}", "training.neftune_noise_alpha=5"), silent, [heard])
    for training, noise, bound in heard.found:
        assert 0.8 * bound < noise <= bound if training else noise == 0
    assert {training for training, *_ in heard.found} == {True, False}
    assert not hasattr(heard.model.get_input_embeddings(), "neftune_noise_alpha")


# Memory


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("key", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_of_activations_changes_nothing(recipe: Path, still: str, key: str) -> None:
    plain = train(changed(recipe, still, "output=plain"), silent)
    close(saved(plain), saved(train(changed(recipe, still, f"training.{key}=true"), silent)))


# Smoothed labels


@pytest.fixture
def batches(bert: Path, llama: Path) -> dict[str, tuple[Any, dict[str, Tensor]]]:
    torch.manual_seed(0)
    ids = torch.randint(5, 15, (3, 6))
    tags = torch.randint(0, 4, (3, 6))
    tags[0, 3:] = tags[:, 0] = -100  # the first token only virtual tokens could predict
    auto = transformers
    return {
        "text-classification": (
            auto.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=4),
            {"input_ids": ids, "labels": torch.tensor([0, 3, 1])},
        ),
        "token-classification": (
            auto.AutoModelForTokenClassification.from_pretrained(bert, num_labels=4),
            {"input_ids": ids, "labels": tags},
        ),
        "text-generation": (
            auto.AutoModelForCausalLM.from_pretrained(llama),
            {"input_ids": ids, "labels": tags},
        ),
    }


CONFIGS = {
    "lora": LoraConfig(r=2, target_modules="all-linear"),
    "prompt": PromptTuningConfig(num_virtual_tokens=2),
}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("task", ["text-classification", "token-classification", "text-generation"])
def test_smoothed_labels_are_as_transformers_smooths_them(batches: Any, tmp_path: Path, task: str, method: str) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    model, batch = batches[task]
    made: Any = get_peft_model(model, CONFIGS[method])
    settings = transformers.Seq2SeqTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = RunTrainer(tmp_path, lambda *_: {}, Objective(0.3), model=made, args=settings)
    outputs = made.eval()(**{name: value for name, value in batch.items() if name != "labels"})
    smoothed = LabelSmoother(0.3)(outputs, batch["labels"], shift_labels=task == "text-generation")
    plain = made(**batch).loss
    assert (smoothed - plain).abs() > 0.01
    torch.testing.assert_close(trainer.compute_loss(made.eval(), dict(batch)), plain)
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(trainer.compute_loss(made.train(), dict(batch)), smoothed)


def test_smoothing_keeps_the_penalty_of_the_method(batches: Any, tmp_path: Path) -> None:
    model, batch = batches["text-classification"]
    config = AdaLoraConfig(init_r=3, target_r=2, total_step=9, tinit=2, tfinal=2, target_modules=["query"])
    made: Any = get_peft_model(model, config)
    settings = transformers.Seq2SeqTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    losses = []
    for weight in (0.0, 0.5):
        made.peft_config["default"].orth_reg_weight = weight
        trainer = RunTrainer(tmp_path, lambda *_: {}, Objective(0.3), model=made, args=settings)
        torch.manual_seed(0)  # of dropout
        losses.append(trainer.compute_loss(made.train(), dict(batch)))
    torch.testing.assert_close(losses[1] - losses[0], made.penalty())
    assert made.penalty() > 0.01


def test_a_smoothed_run(recipe: Path, still: str) -> None:
    """Adam and clipping would hide a wrong scale; plain descent shows it."""
    settings = [still, "training.label_smoothing_factor=0.2", "training.optim=sgd", "training.max_grad_norm=1e9"]
    result = train(changed(recipe, *settings), silent)
    parts = ["training.batch_size=2", "training.gradient_accumulation_steps=3", "output=parts"]
    close(saved(result), saved(train(changed(recipe, *settings, *parts), silent)))
    assert not same(saved(result), saved(train(changed(recipe, *settings[2:], still, "output=plain"), silent)))


def test_a_method_with_a_loss_of_its_own_is_not_smoothed(tmp_path: Path, llama: Path) -> None:
    text = "the film was good\nthe meal is bad\n" * 20
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"task: text-generation\nmodel: {llama}\ndata: {{train: text.txt}}\nmethod: {{name: cpt, cpt_token_ids: [5]}}\n"
        "training: {label_smoothing_factor: 0.1}\noutput: run\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match="CPTConfig makes a loss of its own"):
        train(recipes.read(path), silent)


# Weights of classes


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_weighted_classes_are_pytorch_s(batches: Any, tmp_path: Path, task: str, smoothing: float) -> None:
    """Of two batches of unequal weight the loss is that of both as one, and in evaluation the plain one of each."""
    model, batch = batches[task]
    made: Any = get_peft_model(model, CONFIGS["lora"])
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0])
    settings = transformers.Seq2SeqTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = RunTrainer(tmp_path, lambda *_: {}, Objective(smoothing, weights), model=made, args=settings)
    parts = [{name: value[at] for name, value in batch.items()} for at in (slice(0, 1), slice(1, 3))]
    items = trainer._get_num_items_in_batch(parts, torch.device("cpu"))
    logits = made.eval()(batch["input_ids"]).logits.flatten(0, -2)
    expected = torch.nn.CrossEntropyLoss(weights, label_smoothing=smoothing)(logits, batch["labels"].flatten())
    plain = made(**parts[1]).loss
    torch.testing.assert_close(trainer.compute_loss(made, dict(parts[1]), num_items_in_batch=items), plain)
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = sum(trainer.compute_loss(made.train(), dict(part), num_items_in_batch=items) for part in parts)
    torch.testing.assert_close(found, expected)


def test_balanced_weights_are_scikit_learn_s() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0, 2, 2, 1, 2, 2, 0]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=np.array(labels))
    for found in (labels, [[0, 2, -100], [2, 1, 2], [-100, 2, 0]]):
        np.testing.assert_allclose(class_weights("balanced", ["a", "b", "c"], found), expected, rtol=1e-6)
    assert class_weights({"c": 3}, ["a", "b", "c"], labels).tolist() == [1, 1, 3]


def test_a_run_with_weighted_classes(recipe: Path, still: str) -> None:
    settings = [still, "training.class_weights={praise: 3, blame: 0.5}", "training.optim=sgd"]
    settings += ["training.max_grad_norm=1e9", "training.learning_rate=0.1"]
    result = train(changed(recipe, *settings), silent)
    parts = ["training.batch_size=2", "training.gradient_accumulation_steps=3", "output=parts"]
    close(saved(result), saved(train(changed(recipe, *settings, *parts), silent)))
    with pytest.raises(ConfigError, match=r"class_weights: there is no label 'prase'\. Did you mean 'praise'"):
        train(changed(recipe, "training.class_weights={prase: 3}"), silent)


# A budget of ranks that falls during the run

ADALORA = "method={name: adalora, init_r: 3, target_r: 1, tinit: 1, tfinal: 2, target_modules: [query, value]}"
LAST = "training.load_best_model_at_end=false"  # the best may be of a step before the final choice


def test_adalora_knows_the_steps_of_the_run(recipe: Path) -> None:
    """18 rows in batches of 6, 2 epochs. In the end 1 triplet is kept for each of the 4 sites on average."""
    result = train(changed(recipe, ADALORA, LAST), silent)
    config = AdaLoraConfig.from_pretrained(result.folder)
    assert config.total_step == result.metrics["steps"] == 6
    assert sum(map(sum, config.rank_pattern.values())) == 4
    kept = {name: value.shape[0] for name, value in saved(result).items() if name.endswith("lora_E")}
    assert sum(kept.values()) == 4
    assert recipes.read(result.folder / "recipe.yaml").method["total_step"] == 6


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (["training.batch_size=4", "training.gradient_accumulation_steps=2"], 6),
        (["training.batch_size=7", "training.epochs=1.5"], 5),
        (["training.max_steps=4"], 4),
    ],
)
def test_steps_are_counted_as_trainer_does(recipe: Path, settings: list[str], steps: int) -> None:
    assert planned(changed(recipe, *settings), silent).steps == steps
    assert train(changed(recipe, *settings), silent).metrics["steps"] == steps


def test_a_schedule_that_does_not_fit_the_run_is_refused(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"method.total_step=7, but the run has 6 steps. Leave it out"):
        train(changed(recipe, ADALORA.replace("tinit", "total_step: 7, tinit")), silent)
    with pytest.raises(ConfigError, match=r"tinit=4 and tfinal=2 leave none of total_step=6 steps"):
        train(changed(recipe, ADALORA.replace("tinit: 1", "tinit: 4")), silent)


@pytest.mark.parametrize("step", [3, 5], ids=["while ranks fall", "when they are chosen"])
def test_adalora_goes_on_after_a_break_to_the_same_bits(recipe: Path, step: int) -> None:
    settings = [ADALORA, LAST, "training.eval_strategy=steps", "training.eval_steps=1"]
    through = train(changed(recipe, *settings, "output=through"), silent)
    assert same(saved(broken_and_resumed(changed(recipe, *settings), step)), saved(through))


def test_the_best_checkpoint_has_its_final_ranks(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 18 steps the choice is made at the 16th; the scores only get worse from epoch to epoch."""
    scores = iter([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    monkeypatch.setattr(TextClassification, "metrics", lambda *_: {"accuracy": next(scores, 0.1)})
    best: list[Any] = []
    load = RunTrainer._load_best_model
    monkeypatch.setattr(
        RunTrainer, "_load_best_model", lambda self: (best.append(self.state.best_global_step), load(self))
    )
    result = train(changed(recipe, ADALORA, "training.epochs=6"), silent)
    assert best == [18]
    assert sum(value.shape[0] for name, value in saved(result).items() if "lora_A" in name) == 4  # target_r * sites
