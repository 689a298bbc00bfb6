"""`trimtab inspect`: what lies in an adapter's folder."""

import dataclasses
import json
from typing import Annotated

import typer


def inspect(
    folder: Annotated[str, typer.Argument(help="An adapter's folder, or its id on the hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show an adapter's method, base model, sites, ranks and size, without loading a model."""
    from ..checkpoint import describe

    found = describe(folder)
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "config": found.config.to_dict()}, indent=2))
        return
    from ..outline import fold
    from ..report import columns, size

    config = found.config.to_dict()
    settings = [f"{key}={config[key]}" for key in ("r", "lora_alpha", "lora_dropout", "use_rslora") if key in config]
    facts = [
        ("method", config["peft_type"]),
        ("base model", config["base_model_name_or_path"] or "not named"),
        ("task", config["task_type"] or "none"),
        ("settings", ", ".join(settings)),
        ("parameters", f"{found.parameters:,}"),
        ("on disk", size(found.bytes)),
    ]
    shown = {
        name: ", ".join(f"{end} {' x '.join(map(str, shape))}" for end, shape in sorted(ends.items()))
        for name, ends in found.sites.items()
    }
    print(columns([fact for fact in facts if fact[1]]), end="\n\n")
    print(columns([(line.name, line.what, f"x{line.count}") for line in fold(shown)]))
