"""Imports point one way, the public names are sorted, and `import trimtab` stays light."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trimtab

SOURCE = Path(trimtab.__file__).parent

# From the bottom up. A module imports only from lines above its own; modules on one line do not know each other.
# A folder is one entry: what happens inside it only has to be free of cycles.
LAYERS = [
    {"errors", "rebuilt", "swap", "watch"},
    {"files", "weights", "recipe_file", "rows", "stacks"},
    {"row_inputs"},
    {"adapter"},
    {"sites"},
    {"targets", "triton_kernels"},
    {"kernels"},
    {"attach", "caches"},
    {"prompts", "learning", "routing"},
    {"tokens", "draws", "calls"},
    {"lockstep"},
    {"methods", "merge", "hf_format"},
    {"arithmetic"},
    {"checkpoint", "optimizers"},
    {"model", "kbit", "catalog"},
    {"auto"},
    {"tasks"},
    {"outline", "guess"},
    {"objective", "causal_loss"},
    {"recipe", "layers"},
    {"run", "trainer", "record", "handbook", "propose"},
    {"distillation", "arguments"},
    {"strategies"},
    {"training"},
    {"evaluation"},
    {"report", "progress", "board"},
    {"comparison", "doctor", "many"},
    {"cli"},
    {"__init__", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    """Every module of the package, as a dotted name below it; a folder goes by its own name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The dotted names that a module imports anywhere in it, functions included; ours as relative to the package."""
    path = MODULES[name]
    package = path.relative_to(SOURCE).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            inside = ".".join(part for part in base if part)
            for alias in node.names:
                full = f"{inside}.{alias.name}".removeprefix(".")
                yield f".{full if full in MODULES else inside}"


def ours(name: str) -> set[str]:
    return {found[1:] for found in imports(name) if found.startswith(".")}


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    assert top(name) in LEVEL, f"give {top(name)} its place in LAYERS"
    for other in ours(name):
        assert other in MODULES, f"{name} imports {other!r}, which is no module"
        if top(other) != top(name):
            assert LEVEL[top(other)] < LEVEL[top(name)], f"{name} imports {other}, which is not below it"


def test_there_is_no_import_cycle() -> None:
    order = list(graphlib.TopologicalSorter({name: ours(name) for name in MODULES}).static_order())
    assert set(order) == set(MODULES)


def test_the_package_is_imported_by_relative_names_only() -> None:
    for name in MODULES:
        assert not [found for found in imports(name) if top(found) == "trimtab"], name


@pytest.mark.parametrize("name", [name for name in MODULES if top(name) == "methods"])
def test_methods_know_nothing_of_transformers(name: str) -> None:
    assert not {top(found) for found in imports(name)} & {"transformers", "accelerate", "datasets", "peft"}


def test_hf_peft_is_never_imported() -> None:
    for name in MODULES:
        assert "peft" not in {top(found) for found in imports(name)}, name


def test_public_names_are_sorted_and_there() -> None:
    stub = ast.parse((SOURCE / "__init__.pyi").read_text(encoding="utf-8"))
    [written] = [ast.literal_eval(node.value) for node in stub.body if isinstance(node, ast.Assign)]
    assert written == sorted(set(written)) == list(trimtab.__all__)
    for name in trimtab.__all__:
        value = getattr(trimtab, name)
        assert not hasattr(value, "__module__") or value.__module__.startswith("trimtab.")
    with pytest.raises(AttributeError, match="attribute Lora"):
        trimtab.Lora  # noqa: B018


def test_every_public_error_is_a_value_error() -> None:
    for name in trimtab.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(trimtab, name), trimtab.TrimtabError)
    assert issubclass(trimtab.TrimtabError, ValueError)


def loaded(code: str, modules: str) -> list[str]:
    """Which of these modules are loaded after the code ran in a fresh process."""
    code = f"import sys\n{code}\nprint(*({set(modules.split())!r} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


HEAVY = "transformers accelerate datasets bitsandbytes sklearn matplotlib peft huggingface_hub typer rich yaml"


def test_adapting_needs_neither_transformers_nor_anything_else_that_takes_long() -> None:
    names = [name for name in trimtab.__all__ if name != "Trainer"]  # its base class is transformers'
    assert loaded(f"import trimtab\nfor name in {names}: getattr(trimtab, name)", HEAVY) == []


def test_help_needs_no_torch() -> None:
    assert loaded("import trimtab.cli", f"torch {HEAVY}".replace(" typer rich", "")) == []
