"""The smaller verbs: chat, recipes, doctor."""

import io
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import review, trimtab

from trimtab import doctor, recipe, run
from trimtab.cli.recipes import SHIPPED
from trimtab.tasks import TASKS
from trimtab.training import train

# chat


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A run that learned to answer yes to what is good, and no to what is bad."""
    folder = tmp_path_factory.mktemp("talker")
    rows = [{"prompt": f"{review(i)[0]} ?", "answer": "yes" if i % 2 == 0 else "no"} for i in range(24)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = f"""
task: text-generation
model: {llama}
data: {{train: a.jsonl, validation: a.jsonl}}
method: {{name: lora, r: 8, target_modules: all-linear}}
training: {{epochs: 8, batch_size: 8, learning_rate: 0.02}}
output: run
"""
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return train(recipe.read(folder / "recipe.yaml"), lambda _: None).folder


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_chat_answers_each_line(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, f"{review(0)[0]} ?", "/new", f"{review(1)[0]} ?", "", "never read")
    assert trimtab("chat", talker) == 0
    assert capsys.readouterr().out.split() == ["yes", "no"]


def test_chat_takes_no_other_bytes_than_utf_8(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    assert trimtab("chat", talker) == 2
    assert "is not UTF-8" in capsys.readouterr().err
    assert trimtab("chat", talker, "--seed", "-1") == 2


def test_chat_remembers_what_was_said_until_it_is_too_long(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = run.load(talker)
    seen: list[list[dict[str, str]]] = []

    def answer(model: Any, messages: list[dict[str, str]], **_: Any) -> str:
        seen.append([dict(message) for message in messages])
        return "yes"

    monkeypatch.setattr(type(loaded.task), "reply", lambda _, *given, **settings: answer(*given, **settings))
    long = "good " * 24
    say(monkeypatch, "good", "bad", long, long)
    assert trimtab("chat", talker, "--system", "film") == 0
    contents = [[message["content"] for message in messages] for messages in seen]
    assert contents[:2] == [["film", "good"], ["film", "good", "yes", "bad"]]
    assert contents[2] == ["film", "good", "yes", "bad", "yes", long.strip()]
    assert contents[3] == ["film", "bad", "yes", long.strip(), "yes", long.strip()]  # 61 tokens; with "good", "yes" 66
    assert all(len(loaded.task.prompt(messages)) <= loaded.task.max_length for messages in seen)


def test_only_what_was_trained_to_answer_talks(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert trimtab("train", recipe, "--set", "training.epochs=1") == 0
    assert trimtab("chat", recipe.parent / "run") == 2
    assert "was not trained on chats or instructions. Try: trimtab predict" in capsys.readouterr().err


# recipes


def test_each_task_has_a_recipe_that_is_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert trimtab("recipes", "ls") == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == sorted({path.stem for path in SHIPPED.glob("*.yaml")})
    schema = recipe.schema()
    found = set()
    for name in listed:
        assert trimtab("recipes", "cp", name, tmp_path / f"{name}.yaml") == 0
        read = recipe.read(tmp_path / f"{name}.yaml")
        found.add(read.task)
        jsonschema.validate(read.plain(), schema)
    assert found == set(TASKS)
    assert trimtab("recipes", "cp", "chat", tmp_path / "chat.yaml") == 2
    assert "exists already" in capsys.readouterr().err
    assert trimtab("recipes", "cp", "chatt") == 2
    assert "Did you mean 'chat'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"tsk": "x"}, {"task": "x"}, {"data": {"train": "a", "trian": "b"}}, {"training": {"epohs": 1}},
        {"training": {"epochs": "many"}}, {"method": "lorra"}, {"method": {"name": "lora", "rr": 8}},
        {"method": {"r": 8}}, {"quantization": "nf8"},
    ],
)  # fmt: skip
def test_the_schema_knows_what_is_wrong(change: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert trimtab("recipes", "schema") == 0
    schema = json.loads(capsys.readouterr().out)
    good = yaml.safe_load((SHIPPED / "chat.yaml").read_text(encoding="utf-8"))
    good["training"]["learning_rate"] = 2e-4  # which YAML 1.1 reads as a text
    jsonschema.validate(good, schema)
    jsonschema.validate({**good, "method": ["lora", {"name": "bottleneck"}]}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**good, **change}, schema)


# doctor


def test_doctor_finds_this_machine_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert trimtab("doctor") == 0
    shown = capsys.readouterr().out
    for what in ("Python", "torch", "transformers", "processor", "disk for runs"):
        assert what in shown
    assert "!" not in shown


def test_doctor_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = doctor.version

    def version(name: str) -> str:
        if name == "accelerate":
            raise PackageNotFoundError(name)
        return {"transformers": "4.40.0", "torchvision": "0.1"}.get(name) or real(name)

    asked = {"trimtab": ["transformers>=5", 'nothing; extra == "quant"'], "torchvision": ["torch==2.0.0"]}
    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "distribution", lambda name: SimpleNamespace(requires=asked.get(name)))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    wrong = {finding.what: finding for finding in doctor.examine(tmp_path) if finding.state == "wrong"}
    assert set(wrong) == {"accelerate", "transformers", "torch", "disk for runs", "disk for models"}
    assert wrong["transformers"].found == "4.40.0, but trimtab asks for transformers>=5"
    assert wrong["transformers"].fix.startswith("pip install 'transformers>=5'")
    assert wrong["torch"].found == f"{real('torch')}, but torchvision asks for torch==2.0.0"
    assert wrong["accelerate"].fix == "pip install accelerate"
    assert wrong["disk for runs"].found.startswith("1.0 MB free in ")


def test_doctor_ends_with_1_where_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def examine(_: Path) -> Iterator[doctor.Finding]:
        yield doctor.Finding("torch", "old", "wrong", "pip install torch")

    monkeypatch.setattr(doctor, "examine", examine)
    assert trimtab("doctor") == 1
    assert capsys.readouterr().out == "! torch             old  -> pip install torch\n"
