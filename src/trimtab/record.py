"""What a run leaves for people: its history, a plot of the loss, a page about it, a model card, and what went in."""

import base64
import hashlib
import html
import io
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers

HISTORY = "history.jsonl"
PLOT = "loss.png"
REPORT = "report.html"
CARD = "README.md"


class History(transformers.TrainerCallback):
    """Writes each entry of the log as a line of JSON, as it comes."""

    def __init__(self, path: Path, keep: int) -> None:
        """keep: the entries up to this step stay, those of a run that is gone on with."""
        old = [line for line in read(path) if line["step"] <= keep] if keep else []
        path.write_text("".join(json.dumps(line) + "\n" for line in old), encoding="utf-8")
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a history; a last one that was not written to its end is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def made_with(models: dict[str, str], files: dict[str, Any]) -> dict[str, str]:
    """Versions, and SHA-256 of the models and of the data, by name."""
    packages = ("trimtab", "torch", "transformers", "accelerate", "datasets")
    found = {name: version(name) for name in packages}
    for name, model in models.items():
        folder = Path(model)
        if folder.is_dir():
            found[name] = _hash(path for end in ("*.json", "*.safetensors", "*.bin") for path in folder.glob(end))
        else:
            config = transformers.AutoConfig.from_pretrained(model)
            found[name] = f"revision {getattr(config, '_commit_hash', None)}"
    return found | hashes(files)


def hashes(files: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of files, or of all that is in folders, by name; datasets of the hub as they are named."""
    return {name: _hash(_inside(path)) if isinstance(path, Path) else str(path) for name, path in files.items()}


def _inside(path: Path) -> Iterable[Path]:
    return (found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]


def _hash(paths: Iterable[Path]) -> str:
    """Of one file its SHA-256; of several that of their names and hashes."""
    each = []
    for path in sorted(paths):
        with path.open("rb") as file:
            each.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    if len(each) == 1:
        return each[0][1]
    return hashlib.sha256(json.dumps(each).encode()).hexdigest()


def write(
    folder: Path, title: str, recipe: str, metrics: dict[str, Any], config: dict[str, Any], data: list[str]
) -> None:
    """The plot, the page and the model card of a run, from its history and metrics.

    data: what was said of the rows: how many were read, dropped, cut.
    """
    history = read(folder / HISTORY)
    picture = _plot(history, title)
    (folder / PLOT).write_bytes(picture)
    (folder / REPORT).write_text(_page(title, recipe, metrics, picture, data), encoding="utf-8")
    (folder / CARD).write_text(_card(title, recipe, metrics, config), encoding="utf-8")


def _plot(history: list[dict[str, Any]], title: str) -> bytes:
    """Loss by step, of training and validation, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", title=title)
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(line["step"], line[key]) for line in history if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if key == "eval_loss" else "")
    axes.legend()
    return png(figure)


def png(figure: Any) -> bytes:
    """A figure of matplotlib's, as a file has it."""
    packed = io.BytesIO()
    figure.savefig(packed, format="png", dpi=100)
    return packed.getvalue()


def rows(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """The scores as a table with a header: by split before and after training."""
    found: list[tuple[str, ...]] = [("rows", "score", "before training", "tuned")]
    for split in ("validation", "test"):
        for name, value in metrics.get(split, {}).items():
            found.append((split, name, f"{metrics['untrained'][split][name]:.4f}", f"{value:.4f}"))
    return found


def _page(title: str, recipe: str, metrics: dict[str, Any], picture: bytes, data: list[str]) -> str:
    header, *scores = rows(metrics)
    plain = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
    image = base64.b64encode(picture).decode()
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body {{ font: 16px/1.5 sans-serif; max-width: 46rem; margin: 2rem auto }} td, th {{ padding: .1rem .8rem;
text-align: left }} pre {{ background: #f4f4f4; padding: 1rem; overflow-x: auto }}</style></head><body>
<h1>{html.escape(title)}</h1>
{_table([header, *scores])}
<img alt="loss by step" src="data:image/png;base64,{image}">
{_table([("", ""), *((name, f"{value:,}") for name, value in plain.items())])}
<h2>Data</h2>
<ul>{"".join(f"<li>{html.escape(line)}</li>" for line in data)}</ul>
<h2>Recipe</h2>
<pre>{html.escape(recipe)}</pre>
</body></html>
"""


def _table(lines: list[tuple[str, ...]]) -> str:
    head, *body = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
                   for tag, line in zip(["th"] + ["td"] * len(lines), lines, strict=False))  # fmt: skip
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in (head, *body)) + "</table>"


def _card(title: str, recipe: str, metrics: dict[str, Any], config: dict[str, Any]) -> str:
    header, *scores = rows(metrics)
    lines = ["| " + " | ".join(line) + " |" for line in (header, ("---",) * len(header), *scores)]
    base = config.get("base_model_name_or_path") or "unknown"
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
tags: [trimtab, {str(config["peft_type"]).lower()}]
---

# {title}

An adapter ({config["peft_type"]}, {metrics["trainable_parameters"]:,} trained parameters) for `{base}`, made with
trimtab {version("trimtab")}.

{chr(10).join(lines)}

```python
from trimtab import AutoPeftModel

model = AutoPeftModel.from_pretrained("{title}")
```

Its recipe:

```yaml
{recipe.strip()}
```
"""
