"""docs/recipes.md: what a recipe may hold, and each task with its columns, scores and a recipe to start from."""

import inspect
import sys
from pathlib import Path

from . import layers, objective, recipe
from .tasks import TASKS, Task, augmentation, cleaning
from .tasks.task import Data

RECIPES = Path(__file__).parent / "data" / "recipes"

INTRODUCTION = """\
# Recipes and tasks

Generated from the code by `make docs`. `trimtab recipes cp NAME` copies the recipes below, `trimtab init DATA --model
MODEL` writes one after a look at your data, and `trimtab recipes schema` prints the JSON schema by which editors check
them.
"""


def page() -> str:
    """docs/recipes.md."""
    parts = [INTRODUCTION, "## The recipe\n", _text(recipe.__doc__), "## The data\n", _text(Data.__doc__)]
    parts += [_text(module.__doc__) for module in (cleaning, augmentation)]
    parts += ["## Training\n", *(_text(module.__doc__) for module in (objective, layers))]
    parts += ["## The tasks\n", *(_section(name, task) for name, task in TASKS.items())]
    return "\n".join(parts)


def _text(doc: str | None) -> str:
    return f"```text\n{inspect.cleandoc(doc or '')}\n```\n"


def _section(name: str, task: type[Task]) -> str:
    module = inspect.getdoc(sys.modules[task.__module__]) or ""
    reads = ", ".join(f"`data.{key}`" for key in sorted(task.reads))
    facts = [
        ("columns", "; ".join(_column(task, column) for column in task.usual)),
        ("model", f"`transformers.{task.auto}`"),
        ("the best checkpoint", f"by {task.metric}, the {'highest' if task.higher_is_better else 'lowest'}"),
        *([("reads", reads)] if reads else []),
        *([("drops", ", ".join(sorted(task.drops)))] if task.drops else []),
    ]
    lines = [f"- {what}: {value}" for what, value in facts]
    recipes = [
        text for path in sorted(RECIPES.glob("*.yaml")) if f"\ntask: {name}\n" in (text := path.read_text("utf-8"))
    ]
    shown = [f"```yaml\n{text.strip()}\n```\n" for text in recipes]
    return "\n".join([f"### {name}\n", f"{module}\n\n{inspect.getdoc(task)}\n", *lines, "", *shown])


def _column(task: type[Task], column: str) -> str:
    need = ", may be missing" if column in task.optional else ""
    return f"`{column}` (guessed from {', '.join(task.usual[column])}{need})"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
