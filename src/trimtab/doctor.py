"""What this machine has and can do, what does not fit together, and how that is put right."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from .report import size

# Of these what they ask for is checked; the last ones may be missing.
PACKAGES = ("trimtab", "torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers")
OPTIONAL = ("bitsandbytes", "peft", "torchvision", "torchaudio")
LEAST_DISK = 5e9  # bytes: a small model, its checkpoints and a cache

State = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    what: str
    found: str
    state: State = "ok"
    fix: str = ""


def examine(folder: Path) -> Iterator[Finding]:
    """One finding after another; `folder` is where runs would be written."""
    yield Finding("Python", f"{platform.python_version()}, {sys.executable}")
    yield from _packages()
    yield from _devices()
    yield _quantization()
    yield from _disk(folder)
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield Finding("hub", "HF_HUB_OFFLINE=1: models are loaded from folders and the cache only", "note")


def _packages() -> Iterator[Finding]:
    for name in (*PACKAGES, *OPTIONAL):
        try:
            yield Finding(name, version(name))
        except PackageNotFoundError:
            if name in PACKAGES:
                yield Finding(name, "not installed", "wrong", f"pip install {name}")
            continue
        for required in map(Requirement, distribution(name).requires or ()):
            if required.marker is not None and not required.marker.evaluate({"extra": ""}):
                continue
            try:
                found = version(required.name)
            except PackageNotFoundError:
                yield Finding(
                    required.name, f"not installed; {name} asks for it", "wrong", f"pip install '{_plain(required)}'"
                )
                continue
            if not required.specifier.contains(found, prereleases=True):
                fix = f"pip install '{_plain(required)}', or another {name}"
                yield Finding(required.name, f"{found}, but {name} asks for {_plain(required)}", "wrong", fix)


def _plain(required: Requirement) -> str:
    return f"{required.name}{required.specifier}"


def _devices() -> Iterator[Finding]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding(
        "processor", f"{os.cpu_count()} cores, PyTorch uses {torch.get_num_threads()}; {size(memory)} of memory"
    )
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use fp16"
            yield Finding(f"graphics card {number}", f"{card.name}, {size(card.total_memory)}, {bf16}")
    elif torch.backends.mps.is_available():
        yield Finding("graphics", "Apple's (mps)")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "graphics card", f"there is one, but PyTorch {torch.__version__} does not see it", "wrong",
            "install the PyTorch that was built for its driver: https://pytorch.org/get-started",
        )  # fmt: skip
    else:
        yield Finding("graphics card", "none: training is on the processor", "note")


def _quantization() -> Finding:
    try:
        import bitsandbytes
        import torch

        layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        layer.to(device)(torch.ones(1, 64, device=device))
    except ImportError:
        return Finding("quantization", "none: bitsandbytes is not installed", "note", "pip install 'trimtab[quant]'")
    except Exception as error:  # its own, or the driver's
        reason = str(error).strip().splitlines()[0]
        return Finding("quantization", f"bitsandbytes does not work: {reason}", "wrong", "pip install -U bitsandbytes")
    return Finding("quantization", f"nf4 works on {device}")


def _disk(folder: Path) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for what, place in (("runs", folder), ("models", Path(HF_HUB_CACHE))):
        there = place.absolute()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        room = f"{size(free)} free in {place}"
        if not os.access(there, os.W_OK):
            fix = "set HF_HOME to a folder that can be written to" if what == "models" else "go to another folder"
            yield Finding(f"disk for {what}", f"{place} cannot be written to", "wrong", fix)
        elif free < LEAST_DISK:
            yield Finding(
                f"disk for {what}", f"{size(free)} free in {place}", "wrong", "make room, or use another disk"
            )
        else:
            yield Finding(f"disk for {what}", room)
