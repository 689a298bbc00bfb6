"""LoReFT against h + R^T (W h + b - R h), and where it acts."""

from typing import Any

import models
import numpy as np
import pytest
import torch
from battery import close, run
from models import randomise
from torch import Tensor
from torch.nn import functional as F

from trimtab import ConfigError, LoReftConfig, TargetError, get_peft_model


def adapted(model: Any, **settings: Any) -> Any:
    get_peft_model(model, LoReftConfig(**settings))
    randomise(model)
    return model


def edited(layer: Any, h: Tensor, name: str = "edit") -> Tensor:
    """The formula in numpy; Gram and Schmidt make the rows of R orthonormal."""
    own = getattr(layer.adapters["default"], name)
    R, W, b = (value.detach().numpy().astype(np.float64) for value in (own.R, own.W, own.b))
    rows: list[Any] = []
    for row in R:
        rest = row - sum((row @ done) * done for done in rows)
        rows.append(rest / np.linalg.norm(rest))
    R, h_ = np.stack(rows), h.detach().numpy().astype(np.float64)
    return torch.tensor(h_ + (h_ @ W.T + b - h_ @ R.T) @ R).float()


def outputs(layer: Any) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def hook(_module: Any, args: Any, y: Any) -> None:
        seen["y"] = y[0] if isinstance(y, tuple) else y

    layer.register_forward_hook(hook)
    return seen


@pytest.mark.parametrize("tied", [True, False])
def test_the_formula_at_the_first_and_last_tokens_of_a_padded_batch(tied: bool) -> None:
    """BERT's second row has 3 tokens and 2 of padding: they are neither edited nor counted."""
    model, inputs = models.bert()
    layer = model.bert.encoder.layer[1]
    seen = outputs(layer)
    run(model, inputs)
    h = seen["y"]
    adapted(model, r=3, first=2, last=1, tied=tied, layers=[1])
    run(model, inputs)
    first, last = edited(layer, h), edited(layer, h, "edit" if tied else "last_edit")
    for row, at in ((0, 4), (1, 2)):
        close(seen["y"][row, :2], first[row, :2])
        close(seen["y"][row, at], last[row, at])
    close(seen["y"][0, 2:4], h[0, 2:4])
    close(seen["y"][1, 3:], h[1, 3:])
    assert (seen["y"][:, :2] - h[:, :2]).abs().max() > 1e-2
    assert model.get_nb_trainable_parameters()[0] == (1 if tied else 2) * (2 * 3 * 16 + 3)


def test_left_padding_and_a_layer_that_has_fewer_tokens_than_positions() -> None:
    model, inputs = models.llama()
    layer = model.model.layers[0]
    seen = outputs(layer)
    inputs["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    run(model, inputs)
    h = seen["y"]
    adapted(model, r=2, first=1, last=0, layers=[0])
    run(model, inputs)
    expected = edited(layer, h)
    close(seen["y"][0, 2], expected[0, 2])
    close(seen["y"][1, 0], expected[1, 0])
    close(seen["y"][0, 3:], h[0, 3:])
    adapter = layer.adapters["default"]
    adapter.first = 9
    run(model, inputs)
    close(seen["y"][1], expected[1])


def test_what_is_generated_is_left_alone() -> None:
    """With the cache only the prompt is edited: as one pass over everything, edited at the prompt's positions."""
    model, inputs = models.llama()
    adapted(model, r=2, first=5, last=0)
    made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    whole = model(input_ids=made[:, :-1]).logits[:, -1].argmax(-1)
    assert torch.equal(made[:, -1], whole)


@pytest.mark.parametrize("name", models.TRANSFORMERS)
def test_every_architecture_has_its_layers_found(name: str) -> None:
    model, inputs = models.TRANSFORMERS[name]()
    base = run(model, inputs)
    adapted(model, first=1, last=1, r=2, layers=[0, 1])
    sites = [status.name for status in model.get_layer_status() if status.name]
    assert len(sites) == 2
    assert (run(model, inputs) - base).abs().max() > 1e-3


def test_it_learns_to_steer_a_language_model() -> None:
    """Frozen, tiny, random Llama: edits at the prompt make it say what it is told to."""
    model, inputs = models.llama()
    labels = torch.tensor([7, 9])
    frozen = F.cross_entropy(model(**inputs).logits[:, -1], labels).item()
    get_peft_model(model, LoReftConfig(r=4, first=0, last=1))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(80):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(**inputs).logits[:, -1], labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.4 * frozen  # logits of 16 normed features cannot get much further apart


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"first": 0, "last": 0}, ConfigError, "Closest: last=1"),
        ({"r": 17}, ConfigError, "16 wide: r=17 orthonormal rows do not fit. Closest: 16"),
        ({"layers": [5]}, ConfigError, r"layers names \[5\]; the model has layers \[0, 1\]"),
        ({"target_modules": ["decoder.block.0"]}, TargetError, "Target the encoder's layers"),
    ],
)
def test_nonsense(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        adapted(models.t5().model, **settings)
