"""What a run came to, and what it predicts, as tables."""

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table


def summary(metrics: dict[str, Any]) -> Table:
    """The scores on the test rows, or else the validation rows, and what they cost."""
    split = "test" if "test" in metrics else "validation"
    table = Table(title=f"{split} ({metrics['rows'][split]} rows)", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    names = [name for name in metrics[split] if name in metrics["majority"][split]]
    for name in names:
        table.add_row(f"{name}, always the commonest class", f"{metrics['majority'][split][name]:.3f}")
        table.add_row(f"{name}, untrained head", f"{metrics['untrained'][split][name]:.3f}")
        table.add_row(f"{name}, tuned", f"[bold]{metrics[split][name]:.3f}[/bold]", end_section=True)
    trained, total = metrics["trainable_parameters"], metrics["total_parameters"]
    table.add_row("trained parameters", f"{trained:,} of {total:,} ({trained / total:.2%})")
    table.add_row("adapter on disk", size(metrics["adapter_bytes"]))
    table.add_row("time", f"{metrics['seconds']:.0f} s")
    table.add_row("peak memory", size(metrics["peak_memory_bytes"]))
    return table


def predictions(inputs: Sequence[Any], answers: Sequence[dict[str, float]]) -> Table:
    """Each input (a text, or a pair) with the probability of each class, the likeliest in bold."""
    table = Table("text", *answers[0], box=None, padding=(0, 2, 0, 0))
    for text, answer in zip(inputs, answers, strict=True):
        best = max(answer.values())
        shown = (f"[bold]{value:.3f}[/bold]" if value == best else f"{value:.3f}" for value in answer.values())
        table.add_row(escape(" / ".join(text) if isinstance(text, tuple) else text), *shown)
    return table


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
