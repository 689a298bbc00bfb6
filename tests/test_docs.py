"""The README's and the docs' snippets run as they stand, on a tiny model in place of the reader's."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import review, write_csv

from trimtab import cli, handbook

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def reader(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the snippets speak of: `my-model` and `reviews.csv`."""
    shutil.copytree(bert, tmp_path / "my-model")
    write_csv(tmp_path / "reviews.csv", [review(i) for i in range(40)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets_run(page: Path, reader: Path) -> None:
    names: dict[str, object] = {}
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page: Path, reader: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for recipe in blocks(page, "yaml"):
        (reader / "recipe.yaml").write_text(recipe, encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in blocks(page, "console"):
        for line in block.splitlines():
            program, *arguments = shlex.split(line.removeprefix("$ "), comments=True)
            if program == "make":  # run by whoever runs the tests; here it must exist
                assert re.search(rf"^{arguments[0]}:", makefile, re.M), line
                continue
            assert program == "trimtab", line
            with pytest.raises(SystemExit) as ended:
                cli.main(arguments)
            assert ended.value.code == 0, (line, capfd.readouterr().err)


def test_the_readme_has_snippets_to_run() -> None:
    assert blocks(ROOT / "README.md", "python")
    assert blocks(ROOT / "README.md", "yaml")
    assert blocks(ROOT / "README.md", "console")


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), (page.name, target)


def test_the_page_on_recipes_is_what_make_docs_makes() -> None:
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == handbook.page(), "run `make docs`"
