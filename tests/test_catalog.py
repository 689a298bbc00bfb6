"""The table of methods, on the command line and as a page: read off the methods, so it cannot lag behind them."""

import re
from pathlib import Path

import pytest
import torch

from trimtab import LoraConfig, MergeError, catalog, cli, get_peft_model
from trimtab.methods import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


def test_the_page_is_what_make_docs_makes() -> None:
    assert PAGE.read_text(encoding="utf-8") == catalog.page(
        (PAGE.parent / "benchmarks" / "methods.md").read_text(encoding="utf-8")
    ), "run `make docs`"


def test_every_method_has_a_line_and_says_what_it_is() -> None:
    found = catalog.entries()
    assert [entry.name for entry in found] == list(METHODS)
    assert all(entry.paper and entry.formula and entry.fits for entry in found)
    # Said of this very method, not inherited from another.
    assert all({"trains", "when", "evidence"} <= vars(entry.config).keys() for entry in found)


def test_the_command_counts_on_a_model(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LoRA's r = 8 on query and value of 2 layers of width 64: 8 (64 + 64) each."""
    with pytest.raises(SystemExit, match="0"):
        cli.main(["methods", "--model", str(bert)])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == {"method", *METHODS}
    assert re.split("  +", lines["lora"])[1:4] == ["low-rank A and B", f"{4 * 8 * 128:,}", "yes"]
    with pytest.raises(SystemExit, match="0"):
        cli.main(["methods"])
    assert capsys.readouterr().out.split()[:3] == ["method", "trains", "merges"]


def test_a_method_that_does_not_fit_says_so() -> None:
    counted = catalog.trainable(METHODS["bottleneck"], torch.nn.Sequential(torch.nn.Linear(3, 3)))
    assert isinstance(counted, str)
    assert "Give target_modules" in counted


@pytest.mark.parametrize("entry", catalog.entries(), ids=lambda entry: entry.name)
def test_what_it_says_of_merging_is_true(entry: catalog.Entry, bert: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(bert)
    counted = catalog.trainable(entry.config, model)
    adapted = get_peft_model(model, entry.config(**entry.config.example))
    assert adapted.get_nb_trainable_parameters()[0] == counted
    if entry.merges:
        adapted.merge_adapter()
    else:
        with pytest.raises(MergeError):
            adapted.merge_adapter()


def test_counting_draws_no_memory() -> None:
    """On the meta device, as a model's outline is."""
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(10**6, 10**5))
    assert catalog.trainable(type("Config", (LoraConfig,), {"example": {"target_modules": ["0"]}}), model) == 8_800_000
