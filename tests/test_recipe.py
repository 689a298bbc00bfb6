"""Recipes: what they mean, and that nothing wrong in one goes unsaid."""

from pathlib import Path

import datasets
import pytest
from conftest import review, write_csv
from pydantic import ValidationError
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from trimtab import recipe as recipes
from trimtab.errors import DataError, RecipeError
from trimtab.training import train

GOOD = """\
task: text-classification
model: some/model
data:
  train: train.csv
  columns: {text: review}
method: {name: lora, r: 4}
training:
  learning_rate: 5e-4
  epochs: 3
output: runs/x
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD, encoding="utf-8")
    return path


def changed(path: Path, old: str, new: str) -> Path:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipes.read(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "")


def test_a_recipe_means_what_it_says(good: Path) -> None:
    recipe = recipes.read(good)
    assert recipe.data.train == good.parent / "train.csv"
    assert recipe.output == good.parent / "runs/x"
    assert recipe.data.validation == 0.1
    assert recipe.data.columns == {"text": "review"}
    assert recipe.training == {"learning_rate": 0.0005, "num_train_epochs": 3}
    assert recipe.method == {"name": "lora", "r": 4}
    assert (recipe.quantization, recipe.seed) == ("none", 0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("output:", "outptu:", "recipe.yaml:10: the recipe has no key 'outptu'. Did you mean 'output'?"),
        ("  train:", "  trian:", "recipe.yaml:4: data has no key 'trian'. Did you mean 'train'?"),
        ("{text:", "{txt:", "recipe.yaml:5: data.columns has no key 'txt'. Did you mean 'text'?"),
        ("r: 4", "rr: 4", "recipe.yaml:6: method has no key 'rr'. Did you mean 'r'?"),
        (
            "learning_rate",
            "learning_rat",
            "recipe.yaml:8: training has no key 'learning_rat'. Did you mean 'learning_rate'?",
        ),
        ("name: lora", "name: [lora]", "recipe.yaml:6: method.name: there is no ['lora']."),
        ("name: lora", "name: lorra", "recipe.yaml:6: method.name: there is no 'lorra'. Did you mean 'lora'?"),
        ("name: lora, ", "", "recipe.yaml:6: method has no key 'name', which is one of: adalora, "),
        ("{name: lora, r: 4}", "[lora, {name: ia3, r: 3}]", "recipe.yaml:6: method.1 has no key 'r'."),
        ("{name: lora, r: 4}", "[]", "recipe.yaml:6: method: name a method, or several."),
        ("text-class", "txt-class", "recipe.yaml:1: task: there is no 'txt-classification'. Did you mean 'text-cl"),
        ("r: 4", "r: four", "recipe.yaml:6: LoraConfig: r='four': Input should be a valid integer"),
        ("r: 4", "task_type: SEQ_CLS", "recipe.yaml:6: method has no key 'task_type'."),
        ("epochs: 3", "epochs: three", "recipe.yaml:9: training.epochs: Input should be a valid number."),
        ("epochs: 3", "epochs: true", "recipe.yaml:9: training.epochs: Input should be a valid number."),
        ("epochs: 3", "epochs: 0", "recipe.yaml:9: training.epochs: Input should be greater than 0."),
        ("epochs: 3", "warmup_ratio: 30", "recipe.yaml:9: training.warmup_ratio=30 is no share of the steps."),
        ("epochs: 3", "bf16: 1", "recipe.yaml:9: training.bf16: Input should be a valid boolean."),
        ("epochs: 3", "lr_scheduler_type: cosin", "recipe.yaml:9: training.lr_scheduler_type: Input should be 'lin"),
        ("epochs: 3", "push_to_hub: true", "recipe.yaml:9: training.push_to_hub cannot be set in a recipe"),
        ("epochs: 3", "learning_rate: 1", "recipe.yaml:9: 'learning_rate' is there twice, first in line 8."),
        ("  train: train.csv\n", "", "recipe.yaml:3: data has no key 'train', which must be there."),
        ("output: runs/x\n", "", "recipe.yaml:1: the recipe has no key 'output', which must be there."),
        ("model: some/model", "model: ./nowhere", "recipe.yaml:2: there is no model folder ./nowhere."),
        ("model: some/model", "model: 3", "recipe.yaml:2: model: Input should be a valid string."),
        ("output: runs/x", "output: 3", "recipe.yaml:10: output: Input should be a path."),
        ("train: train.csv", "train: train.csv\n  validation: 1.5", "recipe.yaml:5: data.validation: Input should be "),
        ("train: train.csv", "train: train.csv\n  max_length: 0", "recipe.yaml:5: data.max_length: Input should be "),
        ("epochs: 3", "early_stopping_threshold: 0.1", "recipe.yaml:9: training.early_stopping_threshold is of no us"),
        ("epochs: 3", "distillation: {temperature: 2}", "recipe.yaml:9: training.distillation: Field required."),
        ("epochs: 3", "distillation: {teacher: a, wait: 1}", "recipe.yaml:9: training.distillation.wait: Extra inpu"),
        ("epochs: 3", "distillation: {teacher: ./none}", "recipe.yaml:9: there is no model folder ./none."),
        ("epochs: 3", "class_weights: {a: 0}", "recipe.yaml:9: training.class_weights.a: Input should be greater "),
        ("epochs: 3", "early_stopping_patience: 0", "recipe.yaml:9: training.early_stopping_patience: Input should b"),
        ("epochs: 3", "lr_scheduler_type: constant\n  warmup_ratio: 0.1", "recipe.yaml:10: training.warmup_ratio is o"),
        ("epochs: 3", "lr_scheduler_type: greedy\n  warmup_steps: 3", "recipe.yaml:10: training.warmup_steps is of no"),
        (
            "epochs: 3",
            "lr_scheduler_type: reduce_lr_on_plateau\n  lr_scheduler_kwargs: {mode: min}",
            "recipe.yaml:10: training.lr_scheduler_kwargs is of no use with a mode, which follows from the metric",
        ),
        (
            "epochs: 3",
            "lr_scheduler_type: reduce_lr_on_plateau\n  eval_strategy: no",
            "recipe.yaml:9: training.lr_scheduler_type is of no use as 'reduce_lr_on_plateau' where training.eval_str",
        ),
        (
            "epochs: 3",
            "early_stopping_patience: 1\n  eval_strategy: no",
            "recipe.yaml:9: training.early_stopping_patience is of no use where training.eval_strategy is 'no'",
        ),
        ("output: runs/x", "output: x\nquantization: nf5", "recipe.yaml:11: quantization: Input should be 'none'"),
        ("data:\n", "data: 3\nmore:\n", "recipe.yaml:4: the recipe has no key 'more'."),
        ("{text: review}", "text", "recipe.yaml:5: data.columns should be a mapping"),
        ("{text: review}", "{text: [review}", "recipe.yaml:5: this is no YAML: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(good: Path, old: str, new: str, message: str) -> None:
    said = complaint(changed(good, old, new))
    assert said.startswith(message)
    assert "\n" not in said


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ("question-answering", "label_smoothing_factor: 0.1"),
        ("question-answering", "class_weights: balanced"),
        ("question-answering", "distillation: {teacher: a}"),
        ("text-generation", "class_weights: balanced"),
        ("text2text-generation", "class_weights: balanced"),
        ("automatic-speech-recognition", "class_weights: balanced"),
        ("image-classification", "neftune_noise_alpha: 5"),
        ("audio-classification", "neftune_noise_alpha: 5"),
        ("automatic-speech-recognition", "neftune_noise_alpha: 5"),
    ],
)
def test_what_is_of_no_use_to_a_task_is_refused(good: Path, task: str, key: str) -> None:
    changed(good, "task: text-classification", f"task: {task}")
    changed(good, "  columns: {text: review}\n", "")
    said = complaint(changed(good, "  epochs: 3", f"  {key}"))
    assert said == f"recipe.yaml:8: training.{key.partition(':')[0]} is of no use to {task}."


def test_short_and_long_name_together_are_refused(good: Path) -> None:
    changed(good, "epochs: 3", "epochs: 3\n  num_train_epochs: 4")
    assert complaint(good).startswith("recipe.yaml:10: training.epochs and training.num_train_epochs are the same")


@pytest.mark.parametrize("text", ["", "- task", "just words", "# only a comment\n"])
def test_a_file_that_is_no_recipe(good: Path, text: str) -> None:
    good.write_text(text, encoding="utf-8")
    assert complaint(good).startswith("recipe.yaml is no recipe")


def test_a_file_that_is_not_there(good: Path) -> None:
    assert complaint(good.with_name("recipee.yaml")).endswith("Did you mean 'recipe.yaml'?")


def test_a_file_that_is_not_text(good: Path) -> None:
    good.write_bytes(b"\xff\xfe\x00")
    assert complaint(good).startswith("recipe.yaml cannot be read")


@pytest.mark.parametrize("number", ["5e-4", "0.0005", "5.0e-4", "5E-04"])
def test_numbers_are_numbers(good: Path, number: str) -> None:
    assert recipes.read(changed(good, "5e-4", number)).training["learning_rate"] == 0.0005


def test_on_and_no_are_words(good: Path) -> None:
    columns = recipes.read(changed(good, "{text: review}", "{text: on, label: no}")).data.columns
    assert columns == {"text": "on", "label": "no"}


def test_a_key_without_a_value_means_its_default(good: Path) -> None:
    changed(good, "  learning_rate: 5e-4\n  epochs: 3\n", "")
    assert recipes.read(good).training == {}


def test_set_puts_values_in_place(good: Path) -> None:
    overrides = [
        "training.epochs=1",
        "training.seed=7",
        "method.r=2",
        "data.validation=dev.csv",
        "data.columns.label=y",
    ]
    recipe = recipes.read(good, overrides)
    assert recipe.training == {"learning_rate": 0.0005, "num_train_epochs": 1, "seed": 7}
    assert recipe.seed == 7
    assert recipe.config().model_dump()["r"] == 2
    assert recipe.data.validation == good.parent / "dev.csv"
    assert recipe.data.columns == {"text": "review", "label": "y"}


def test_set_reaches_into_a_method_given_by_its_name(good: Path) -> None:
    changed(good, "{name: lora, r: 4}", "lora")
    assert recipes.read(good, ["method.r=2"]).method == {"name": "lora", "r": 2}


def test_set_makes_what_is_missing(good: Path) -> None:
    changed(good, "method: {name: lora, r: 4}\n", "")
    assert recipes.read(good, ["method.name=lora", "method.r=2"]).method == {"name": "lora", "r": 2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=1", "--set training.epoch=1: training has no key 'epoch'. Did you mean 'epochs'?"),
        ("training.epochs=x", "--set training.epochs=x: training.epochs: Input should be a valid number."),
        ("training.epochs=.inf", "--set training.epochs=.inf: training.epochs: Input should be a finite number."),
        ("training.seed=-1", "--set training.seed=-1: training.seed: Input should be greater than or equal to 0."),
        (
            "training.seed=4294967296",
            "--set training.seed=4294967296: training.seed: Input should be less than 4294967296.",
        ),
        (
            "training.label_smoothing_factor=1.5",
            "--set training.label_smoothing_factor=1.5: training.label_smoothing_factor: Input should be less",
        ),
        (
            "training.dataloader_num_workers=-1",
            "--set training.dataloader_num_workers=-1: training.dataloader_num_workers: Input should be greater",
        ),
        ("training.epochs", "--set training.epochs: write KEY=VALUE"),
        ("task.name=x", "--set task.name=x: task is no mapping in recipe.yaml."),
        ("data={train", "--set data={train:1: this is no YAML"),
    ],
)
def test_a_wrong_set_is_named(good: Path, override: str, message: str) -> None:
    assert complaint(good, override).startswith(message)


def test_a_written_recipe_reads_the_same(good: Path, tmp_path: Path) -> None:
    recipe = recipes.read(good, ["data.test=sub/test.csv", "training.warmup_ratio=0.1"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    recipe.write(elsewhere / "copy.yaml")
    assert recipes.read(elsewhere / "copy.yaml") == recipe


def test_models_are_looked_for_beside_the_recipe(good: Path) -> None:
    (good.parent / "some" / "model").mkdir(parents=True)
    assert recipes.read(good).model == str((good.parent / "some" / "model").resolve())


@pytest.mark.parametrize("kind", [TrainingArguments, Seq2SeqTrainingArguments])
def test_training_offers_what_trainingarguments_has(kind: type[TrainingArguments]) -> None:
    defaults = {name: field.default for name, field in kind.__dataclass_fields__.items()}
    offered = recipes._training_model(kind is Seq2SeqTrainingArguments)
    assert (set(defaults) - recipes.NOT_OFFERED) | set(recipes.OWN) == set(offered.model_fields)
    assert not set(recipes.OWN) & set(defaults)
    assert set(recipes.SHORT.values()) <= set(offered.model_fields)
    assert not set(recipes.SHORT) & set(defaults)
    for name in set(offered.model_fields) - set(recipes.OWN):
        value = getattr(defaults[name], "value", defaults[name])
        if isinstance(value, bool | int | float | str) and not ("gt" in recipes.LIMITS.get(name, {}) and value <= 0):
            offered.model_validate({name: value})


def test_gradients_may_be_measured_and_not_cut() -> None:
    recipes._training_model(False).model_validate({"max_grad_norm": float("inf")})
    with pytest.raises(ValidationError):
        recipes._training_model(False).model_validate({"max_grad_norm": float("nan")})


def hub(folder: Path) -> Path:
    """A folder that `datasets.load_dataset` takes for a dataset with two parts."""
    (folder / "data").mkdir(parents=True)
    for split, first in (("train", 0), ("test", 24)):
        write_csv(folder / "data" / f"{split}.csv", [review(i) for i in range(first, first + 24)])
    return folder


def test_rows_may_be_a_dataset_of_the_hub(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = str(hub(tmp_path / "hub"))
    settings = [f"data.train={{path: {path}}}", f"data.test={{path: {path}, split: test}}"]
    found = recipes.read(recipe, settings)
    said: list[str] = []
    result = train(found, lambda line: said.append(str(line)))
    assert "train: 24 rows read, 24 kept" in said
    assert result.metrics["rows"] == {"train": 18, "validation": 6, "test": 24}
    written = recipes.read(result.folder / "recipe.yaml")
    assert written.data.sources == found.data.sources
    assert written.made_with is not None
    assert written.made_with["test"] == f"{path}, test"


def test_wrong_datasets_of_the_hub(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RecipeError, match=r"data.train has no key 'spilt'. Did you mean 'split'"):
        recipes.read(recipe, ["data.train={path: a/b, spilt: test}"])
    path = hub(tmp_path / "hub")
    with pytest.raises(DataError, match=r"The dataset .*hub, tset cannot be loaded: Unknown split \"tset\""):
        train(recipes.read(recipe, [f"data.train={{path: {path}, split: tset}}"]), lambda _: None)
    with pytest.raises(DataError, match=r"The dataset nobody/nothing, train cannot be loaded: "):
        train(recipes.read(recipe, ["data.train={path: nobody/nothing}"]), lambda _: None)


@pytest.mark.parametrize("task", ["text-regression", "rating-prediction", "question-answering"])
def test_what_changes_a_cross_entropy_is_refused_where_there_is_none(recipe: Path, task: str) -> None:
    with pytest.raises(RecipeError, match=rf"label_smoothing_factor is of no use to {task}"):
        recipes.read(recipe, [f"task={task}", "training.label_smoothing_factor=0.1"])
