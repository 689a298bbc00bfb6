"""`trimtab doctor`: what this machine has, and what does not fit together."""

from pathlib import Path

import typer


def doctor() -> None:
    """Check versions, devices and disks, and say how to put right what is wrong.

    Exit code 1 says that something is.
    """
    from .quiet import quiet

    quiet()
    from ..doctor import examine

    wrong = False
    for finding in examine(Path.cwd()):
        mark = {"ok": " ", "note": "-", "wrong": "!"}[finding.state]
        fix = f"  -> {finding.fix}" if finding.fix else ""
        print(f"{mark} {finding.what:17} {finding.found}{fix}", flush=True)
        wrong = wrong or finding.state == "wrong"
    if wrong:
        raise typer.Exit(1)
