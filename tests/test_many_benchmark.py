"""benchmarks/many.py: its smallest rows are measured, so that it cannot rot, and its page says what was measured."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "benchmarks"

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # HF PEFT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_many", ROOT / "benchmarks" / "many.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_the_smallest_rows(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PACKS": ((2, 4),), "ROWS": 3, "NEW": 4, "PROMPT": 2, "VOCABULARY": 50}.items():
        monkeypatch.setattr(script, name, value)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    script.main(["--rounds", "1", "--steps", "4", "--turns", "2", "--output", str(tmp_path)], **sizes)
    found = json.loads((tmp_path / "many.json").read_text(encoding="utf-8"))
    for targets in script.TARGETS:
        assert set(found["mixed"][targets]["generate"]) == {"base", "ours", "hf"}
        assert set(found["packed"][targets]["2x4"]) == {"bound", "ours", "hf"}
        assert set(found["trained"][targets]["2x4"]) == {"ours", "hf"}
        assert all(value > 0 for one in found["trained"][targets]["2x4"].values() for value in one["seconds"])


def test_ratios_are_of_one_round(script: ModuleType) -> None:
    """The second round took ten times as long, for both."""
    found = script.compared({"a": [(2, 4), (20, 40), (3, 6)], "b": [(1, 1), (10, 10), (1, 1)]})
    assert found["a"]["over"]["b"] == [2, 4]
    assert found["a"]["seconds"] == [3, 6]


def test_the_page_says_what_was_measured(script: ModuleType) -> None:
    found = json.loads((RESULTS / "many.json").read_text(encoding="utf-8"))
    assert (RESULTS / "many.md").read_text(encoding="utf-8") == script.page(found)
