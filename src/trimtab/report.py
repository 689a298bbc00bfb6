"""What a run came to, and what it predicts, as tables."""

import json
from collections.abc import Sequence
from typing import Any

import yaml
from rich.markup import escape
from rich.table import Table


def summary(metrics: dict[str, Any]) -> Table:
    """The scores on the test rows, or else the validation rows, and what they cost."""
    split = "test" if "test" in metrics else "validation"
    table = Table(title=f"{split} ({metrics['rows'][split]} rows)", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    guessed = metrics["majority"][split]
    for name in [name for name in metrics[split] if name != "loss"]:
        if name in guessed:
            table.add_row(f"{name}, without a model", f"{guessed[name]:.3f}")
        start = "untrained head" if guessed else "before training"
        table.add_row(f"{name}, {start}", f"{metrics['untrained'][split][name]:.3f}")
        table.add_row(f"{name}, tuned", f"[bold]{metrics[split][name]:.3f}[/bold]", end_section=True)
    trained, total = metrics["trainable_parameters"], metrics["total_parameters"]
    table.add_row("trained parameters", f"{trained:,} of {total:,} ({trained / total:.2%})")
    table.add_row("adapter on disk", size(metrics["adapter_bytes"]))
    table.add_row("time", f"{metrics['seconds']:.0f} s")
    table.add_row("peak memory", size(metrics["peak_memory_bytes"]))
    return table


def intervals(found: Any) -> Table:
    """The scores of an evaluation."""
    table = Table("score", "", "95 % interval", title=f"{found.rows:,} rows", title_justify="left")
    for name, value in found.scores.items():
        low, high = found.intervals[name]
        table.add_row(name, f"[bold]{value:.3f}[/bold]", f"{low:.3f} to {high:.3f}")
    return table


def plan(planned: Any) -> str:
    """The recipe as it would be run, and what that comes to."""
    written = yaml.safe_dump(planned.recipe.plain(), sort_keys=False, allow_unicode=True)
    trained, total = planned.trainable_parameters, planned.total_parameters
    facts = [
        ("rows", ", ".join(f"{split} {count:,}" for split, count in planned.rows.items())),
        ("trained parameters", f"{trained:,} of {total:,} ({trained / total:.2%})"),
        ("steps", f"{planned.steps:,}"),
    ]
    return f"\nThe recipe, with what was guessed or left to defaults:\n\n{written}\n{columns(facts)}"


def predictions(inputs: Sequence[Any], answers: Sequence[dict[str, Any]]) -> Table:
    """Each input with its answer; of classes all probabilities, the likeliest in bold."""
    classes = answers[0].get("probabilities")
    table = Table("input", *(classes or answers[0]), box=None, padding=(0, 2, 0, 0))
    for given, answer in zip(inputs, answers, strict=True):
        shown = [escape(_plain(value)) for value in answer.values()]
        if classes:
            best = answer["label"]
            found = answer["probabilities"].items()
            shown = [f"[bold]{value:.3f}[/bold]" if label == best else f"{value:.3f}" for label, value in found]
        table.add_row(escape(" / ".join(given) if isinstance(given, tuple) else str(given)), *shown)
    return table


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def size(number: int) -> str:
    """Bytes for people: 0.6 MB."""
    scaled, unit = float(number), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if scaled < 1000:
            break
        scaled, unit = scaled / 1000, bigger
    return f"{scaled:.0f} {unit}" if unit == "B" or scaled >= 100 else f"{scaled:.1f} {unit}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, never cut or wrapped: names are there to be copied."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
