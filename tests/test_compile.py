"""torch.compile(fullgraph=True) takes a model with adapters: no graph breaks, and it sees every switch of adapters.

The backend is "aot_eager", which traces all that "inductor" does and generates no code.
"""

import shutil
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from battery import close, far, loss, run, same_bits
from models import Tiny, output
from test_integration import SHAPES, all_close, attach, gradients, second
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

LAYERS = {"t5": "num_layers", "gpt2": "n_layer"}
SMALL = {name: partial(build, **{LAYERS.get(name, "num_hidden_layers"): 1}) for name, build in SHAPES.items()}
llama = SMALL["llama"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, **settings: Any) -> Any:
    return torch.compile(model, fullgraph=True, **{"backend": "aot_eager", **settings})


def gradients_through(made: Any, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss(made, inputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)
def test_compiled_equals_eager(build: Callable[..., Tiny]) -> None:
    model, inputs = attach(build())
    active, expected = run(model, inputs), gradients(model, inputs)
    made = compiled(model)
    close(output(made, inputs), active)
    all_close(gradients_through(made, model, inputs), expected)


def test_one_graph_serves_all_lengths() -> None:
    model, inputs = attach(llama())
    counter = CompileCounterWithBackend("aot_eager")
    made = compiled(model, backend=counter, dynamic=True)
    graphs = set()
    for repeats in (5, 7, 4):
        given = {name: value.repeat(1, repeats) for name, value in inputs.items()}
        close(run(made, given), run(model, given))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_switching_adapters_after_compiling() -> None:
    model, inputs = attach(llama())
    second(model)
    made = compiled(model)
    base = run(*llama())
    for names in (["default"], ["second"], ["default", "second"], ["default"]):
        model.set_adapter(names)
        close(run(made, inputs), run(model, inputs))
        far(run(made, inputs), base)
    with model.disable_adapter():
        assert same_bits(run(made, inputs), run(model, inputs))
        close(run(made, inputs), base)
    model.set_adapter("second")
    active = run(model, inputs)
    model.merge_adapter()
    close(run(made, inputs), active)
    model.unmerge_adapter()
    close(run(made, inputs), active)
    model.delete_adapter("default")
    close(run(made, inputs), active)
    close(run(compiled(model.unload()), inputs), base)
    close(run(made, inputs), base)


def test_attaching_after_compiling() -> None:
    model, inputs = llama()
    made = compiled(model)
    base = run(made, inputs)
    attach(Tiny(model, inputs))
    far(run(made, inputs), base)
    close(run(made, inputs), run(model, inputs))


def test_compiling_in_place() -> None:
    model, inputs = attach(llama())
    active, expected = run(model, inputs), gradients(model, inputs)
    model.compile(backend="aot_eager", fullgraph=True)
    close(output(model, inputs), active)
    all_close(gradients(model, inputs), expected)


def test_steps_of_training_see_the_changed_weights() -> None:
    losses = []
    for how in (lambda model: model, compiled):
        model, inputs = attach(llama())
        made = how(model.train())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses.append([])
        for _ in range(3):
            value = loss(made, inputs)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(value.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][0] > losses[0][1] > losses[0][2]


# torch.compile imports a part of PyTorch that is written in the way that PyTorch gives up.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_inductor() -> None:
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not ((shutil.which("g++") or shutil.which("clang++")) and headers.exists()):
        pytest.skip("inductor generates C++: it wants a compiler and Python's headers, which are not here")
    model, inputs = attach(models.mlp(), ["first", "second"])
    active, expected = run(model, inputs), gradients(model, inputs)
    made = compiled(model, backend="inductor")
    close(output(made, inputs), active)
    all_close(gradients_through(made, model, inputs), expected)
