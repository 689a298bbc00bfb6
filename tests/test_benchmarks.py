"""What benchmarks/methods.py does around its measurements, and that the page says what was measured."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trimtab.methods import METHODS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_methods", ROOT / "benchmarks" / "methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_line(script: ModuleType) -> None:
    assert {row.method for row in script.ROWS} == {None, *METHODS} - {"cpt", "full"}  # for decoders; None
    assert len({row.name for row in script.ROWS}) == len(script.ROWS)


def test_the_page_says_what_was_measured(script: ModuleType) -> None:
    run = json.loads((RESULTS / "methods.json").read_text(encoding="utf-8"))
    assert (RESULTS / "methods.md").read_text(encoding="utf-8") == script.page(run)
    assert {row["name"] for row in run["rows"]} == {row.name for row in script.ROWS}


def test_lines_that_are_added_keep_the_others(script: ModuleType) -> None:
    alike = {"sentences": 4, "tried": 3, "held_out": 2, "dev": 1}
    rows = [{"name": name, "accuracy": 0.5} for name in ("vera", "lora")]
    before, now = ({**alike, "minutes": 2.0, "rows": own} for own in (rows, [{"name": "lora", "accuracy": 0.6}]))
    found = script.added(before, now)
    assert found == {**alike, "minutes": 4.0, "rows": [{"name": "lora", "accuracy": 0.6}, rows[0]]}
    with pytest.raises(SystemExit, match="were measured with other sentences"):
        script.added({**before, "tried": 9}, now)


@pytest.mark.parametrize(
    ("scores", "tried", "best"),
    [
        ({0.5: 0.1, 2: 0.3, 8: 0.2}, [0.5, 2, 8], 2),
        ({0.125: 0.1, 0.5: 0.4, 2: 0.3, 8: 0.2}, [0.125, 0.5, 2, 8], 0.5),
        ({0.5: 0.1, 2: 0.3, 8: 0.4, 32: 0.5, 128: 0.6, 512: 0.7}, [0.5, 2, 8, 32, 128], 128),
        ({0.5: 0.3, 2: 0.3, 8: 0.1, 0.125: 0.3, 0.03125: 0.2}, [0.03125, 0.125, 0.5, 2, 8], 0.125),
    ],
)
def test_the_search_goes_on_beyond_an_end(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, scores: dict[float, float], tried: list[float], best: float
) -> None:
    class Fake:
        def __init__(self, row: Any, rate: float, rows: Any, folder: str) -> None:
            self.rate = rate

        def train(self) -> None:
            pass

        def evaluate(self, rows: Any) -> dict[str, float]:
            return {"eval_accuracy": scores[self.rate]}

    monkeypatch.setattr(script, "trainer", Fake)
    monkeypatch.setattr(script, "quiet", lambda: None)
    found = script.choose((script.Row("", None, 2), script.Data([], [], [], [])))
    assert list(found) == tried
    assert script.best(found) == best
