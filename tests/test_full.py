"""Full fine-tuning as a method: plain PyTorch's steps, tied weights, files, and runs."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from battery import close
from models import Tiny, output
from test_layers import Moved
from test_strategies import broken_and_resumed, changed, same, saved, silent
from torch import nn

from trimtab import FullConfig, PeftModel, TargetError, get_peft_model, run
from trimtab.layers import groups
from trimtab.training import train

SHAPES: dict[str, Callable[[], Tiny]] = {
    "bert": models.bert,
    "gpt2": partial(models.gpt2, initializer_range=0.2),
    "llama": models.llama,
    "tied llama": partial(models.llama, tie_word_embeddings=True),
    "t5": models.t5,
    "vit": models.vit,
    "convolutions": models.convolutions,
}


def steps(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output(model.train(), inputs).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", SHAPES)
def test_steps_are_those_of_a_plain_model(name: str, tmp_path: Path) -> None:
    plain, inputs = SHAPES[name]()
    model: Any = get_peft_model(SHAPES[name]().model, FullConfig())
    assert model.get_nb_trainable_parameters()[0] == sum(parameter.numel() for parameter in plain.parameters())
    base = copy.deepcopy(plain.state_dict())
    steps(plain, inputs)
    steps(model, inputs)
    expected = output(plain.eval(), inputs)
    close(output(model.eval(), inputs), expected)
    assert (expected - output(SHAPES[name]().model, inputs)).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(SHAPES[name]().model, tmp_path)
    close(output(loaded.eval(), inputs), output(model, inputs))
    merged = loaded.merge_and_unload().state_dict()
    for key, value in plain.state_dict().items():
        close(merged[key], value)
    assert all(torch.equal(value, base[key]) for key, value in model.unload().state_dict().items())


def test_tied_weights_stay_tied() -> None:
    model: Any = get_peft_model(models.llama(tie_word_embeddings=True).model, FullConfig())
    copies = [part.adapters["default"].replacement.weight for part in (model.model.embed_tokens, model.lm_head)]
    assert copies[0] is copies[1]


def test_what_cannot_be_trained_whole() -> None:
    with pytest.raises(TargetError, match="is quantized, and cannot be trained whole"):
        get_peft_model(models.quantized8().model, FullConfig())

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.layer = nn.Linear(2, 2)

    with pytest.raises(TargetError, match="Scaled has values outside of its modules"):
        get_peft_model(Scaled(), FullConfig())


def test_layers_are_those_of_the_model() -> None:
    """Embeddings, two layers, pooler and head."""
    model: Any = get_peft_model(models.bert().model, FullConfig(task_type="SEQ_CLS"))
    assert len(groups(model)) == 4


def test_a_run_trains_all_and_is_loaded_again(recipe: Path) -> None:
    settings = ["method=full", "training.learning_rate=0.001", "training.gradual_unfreezing=output"]
    settings += ["training.neftune_noise_alpha=5", "training.eval_strategy=steps", "training.eval_steps=2"]
    moved = Moved()
    result = train(changed(recipe, *settings, "output=through"), silent, [moved])
    assert [len(found) for found in moved.steps] == [1, 3, 4, 5]  # of 6 steps; the rate of the first is 0
    found = run.load(result.folder)
    plain = sum(parameter.numel() for name, parameter in found.model.named_parameters() if "adapters" not in name)
    assert result.metrics["trainable_parameters"] == plain
    assert same(saved(broken_and_resumed(changed(recipe, *settings), 3)), saved(result))
    assert run.merge(result.folder, recipe.parent / "merged") < 1e-5
