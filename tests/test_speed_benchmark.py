"""benchmarks/speed.py: its smallest row is measured, so that it cannot rot, and its page says what was measured."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "benchmarks"

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # HF PEFT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_speed", ROOT / "benchmarks" / "speed.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_smallest_row(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "imports", lambda: {"torch": 1.0})  # three new processes each, which take long
    monkeypatch.setattr(script, "SECONDS", 0)
    method = "lora, all-linear, dropout"
    smallest = ["--models", "tiny", "--shapes", "2x3", "--steps", "1", "--output", str(tmp_path)]
    script.main([*smallest, "--methods", method])
    script.main([*smallest, "--methods", "ia3", "--add"])
    run = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in run["rows"]] == [method, "ia3"]
    row = run["rows"][0]
    assert set(row["sides"]) == set(script.SIDES)
    for side, found in row["sides"].items():
        assert all(value > 0 for name, value in found.items() if name != "over")
        assert set(found["over"]) == ({"bound", "full"} if side == "full" else {"ours", "hf", "bound"})
        assert found["over"][side] == 1
    assert row["sides"]["full"]["peak_bytes"] > row["sides"]["bound"]["peak_bytes"]
    assert set(row["verbs"]["ours"]) == set(row["verbs"]["hf"]) == set(script.VERBS)
    assert (tmp_path / "speed.md").read_text(encoding="utf-8") == script.page(run)
    assert (tmp_path / "speed.png").stat().st_size


def test_losses_that_differ_are_no_comparison(script: ModuleType, tmp_path: Path) -> None:
    models = script.sides(script.tiny(), script.METHODS["lora, query and value"], tmp_path)
    given = script.batch(models["bound"], "2x3")
    script.check(models, given, dropout=False)
    for parameter in script.trained(models["hf"]):
        parameter.data.mul_(10)
    with pytest.raises(AssertionError, match="differ"):
        script.check(models, given, dropout=False)
    for parameter in script.trained(models["ours"]):
        parameter.data.zero_()
    with pytest.raises(AssertionError, match="ours: zero gradients"):
        script.check(models, given, dropout=False)


def test_the_page_says_what_was_measured(script: ModuleType) -> None:
    run = json.loads((RESULTS / "speed.json").read_text(encoding="utf-8"))
    assert (RESULTS / "speed.md").read_text(encoding="utf-8") == script.page(run)
