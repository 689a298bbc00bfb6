"""Layers that learn one after another, or each at its own rate."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
import transformers
from models import Tiny
from test_every_method import SETTINGS
from test_strategies import broken_and_resumed, changed, same, saved, silent
from torch import Tensor, nn

from trimtab import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from trimtab.errors import ConfigError
from trimtab.layers import GradualUnfreezing, groups, rates
from trimtab.methods import METHODS
from trimtab.optimizers import with_rates
from trimtab.training import train

PROMPT = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")

# model, config, and for each group the modules that are in it, by the start of their names
PLACES: dict[str, tuple[Callable[..., Tiny], PeftConfig | list[PeftConfig], list[list[str]]]] = {
    "classifier": (
        models.bert,
        LoraConfig(target_modules=["query", "dense"], task_type="SEQ_CLS"),
        [["bert.encoder.layer.0."], ["bert.encoder.layer.1."], ["bert.pooler.", "classifier."]],
    ),
    "embeddings and head": (
        models.llama,
        LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm", "lm_head"]),
        [["model.embed_tokens."], ["model.layers.0."], ["model.layers.1."], ["model.norm.", "lm_head."]],
    ),
    "virtual tokens": (
        models.gpt2,
        [PROMPT, LoraConfig(target_modules=["c_attn"])],
        [["adapters."], ["transformer.h.0."], ["transformer.h.1."]],
    ),
    "some layers": (
        lambda: models.gpt2(n_layer=12),
        LoraConfig(target_modules=["c_attn"], layers_to_transform=[10, 2]),
        [["transformer.h.2."], ["transformer.h.10."]],
    ),
    "encoder and decoder": (
        models.t5,
        LoraConfig(target_modules=["q", "lm_head"]),
        [["encoder.block.0."], ["encoder.block.1."], ["decoder.block.0."], ["decoder.block.1."], ["lm_head."]],
    ),
    "images": (
        models.vit,
        LoraConfig(target_modules=["q_proj", "projection"], modules_to_save=["classifier"]),
        [["vit.embeddings."], ["vit.encoder.layer.0.", "vit.layers.0."], ["vit.encoder.layer.1.", "vit.layers.1."],
         ["classifier."]],
    ),
    "one place": (
        models.mlp,
        LoraConfig(r=2, target_modules=["first", "second"]),
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_groups_follow_the_structure(name: str) -> None:
    build, config, expected = PLACES[name]
    model: Any = get_peft_model(build().model, config)
    if not expected:
        with pytest.raises(ConfigError, match="lies in one place"):
            groups(model)
        return
    named = {parameter: name for name, parameter in model.named_parameters()}
    found = [[named[parameter] for parameter in group] for group in groups(model)]
    assert len(found) == len(expected)
    for group, starts in zip(found, expected, strict=True):
        assert all(name.startswith(tuple(starts)) for name in group), (group, starts)
    assert sorted(name for group in found for name in group) == sorted(
        name for name, p in model.named_parameters() if p.requires_grad
    )


def values(found: list[list[nn.Parameter]]) -> list[list[Tensor]]:
    return [[parameter.detach().clone() for parameter in group] for group in found]


def adapted(method: str) -> Any:
    """A Llama with the method and, so that there are two groups at least, a trained head."""
    torch.manual_seed(0)
    model = models.llama(attention_bias=True).model  # BitFit wants biases
    head = LoraConfig(r=2, target_modules=["lm_head"])
    return get_peft_model(model, [METHODS[method](**SETTINGS[method]), head])


NOT_HERE = ("adalora", "mam", "unipelt")  # refused; unions already


@pytest.mark.parametrize("begin", ["input", "output"])
@pytest.mark.parametrize("method", [name for name in SETTINGS if name not in NOT_HERE])
def test_what_is_frozen_does_not_move(method: str, begin: Any) -> None:
    """With weight decay and momentum, two steps for each group: the k-th moves from step 2 k on."""
    model = adapted(method)
    found = groups(model)
    ordered = found if begin == "input" else found[::-1]
    callback = GradualUnfreezing(model, begin, 1.0)
    optimizer = torch.optim.AdamW([p for group in found for p in group], lr=0.1, weight_decay=0.1)
    batch = {**models.llama().inputs, "labels": models.ids()}
    for step in range(2 * len(found)):
        before = values(ordered)
        callback.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=2 * len(found)), None)
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = [
            any(not torch.equal(old, new) for old, new in zip(*pair, strict=True))
            for pair in zip(before, values(ordered), strict=True)
        ]
        assert moved == [k <= step // 2 for k in range(len(found))], step
    callback.on_train_end(None, None, None)
    assert all(parameter.requires_grad for group in found for parameter in group)


@pytest.mark.parametrize(("begin", "ratio"), [("output", 1.0), ("input", 1.0), ("output", 0.5)])
def test_steps_at_which_layers_join(begin: Any, ratio: float) -> None:
    model: Any = get_peft_model(models.bert().model, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    callback = GradualUnfreezing(model, begin, ratio)
    ordered = groups(model) if begin == "input" else groups(model)[::-1]
    for step in range(10):
        callback.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=10), None)
        trains = [all(parameter.requires_grad for parameter in group) for group in ordered]
        assert trains == [step >= math.ceil(k * ratio * 10 / 3) for k in range(3)]


@pytest.mark.parametrize("decay", [0.5, 2.0])
def test_rates_fall_or_grow_from_layer_to_layer(decay: float) -> None:
    """SGD's first step is rate times gradient."""
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    model: Any = get_peft_model(models.bert().model, config)
    before = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = with_rates(torch.optim.SGD(trained, lr=0.1), rates(model, decay))
    model(**models.bert().inputs, labels=torch.tensor([2, 0])).loss.backward()
    optimizer.step()
    named = dict(before.named_parameters())
    for name, value in model.named_parameters():
        if value.requires_grad:
            k = 0 if name.startswith("classifier") else 1 if ".1." in name else 2
            torch.testing.assert_close(value, named[name] - 0.1 * decay**k * value.grad, rtol=1e-5, atol=1e-6)


# From a recipe

UNFREEZING = ["training.gradual_unfreezing=output", "training.weight_decay=0.1", "training.epochs=3"]


class Moved(transformers.TrainerCallback):
    """By group, the steps in which it changed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.groups = groups(model)
        self.before = values(self.groups)
        self.steps: list[list[int]] = [[] for _ in self.groups]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for group, before, steps in zip(self.groups, self.before, self.steps, strict=True):
            if any(not torch.equal(old, new) for old, new in zip(before, group, strict=True)):
                steps.append(state.global_step - 1)
        self.before = values(self.groups)


@pytest.mark.parametrize(("begin", "first"), [("output", [6, 3, 0]), ("input", [0, 3, 6])])
def test_a_run_unfreezes_layer_after_layer(recipe: Path, begin: str, first: list[int]) -> None:
    """9 steps and 3 groups: two layers and the head. In the first step of a warmup the rate is 0."""
    moved = Moved()
    settings = [*UNFREEZING, f"training.gradual_unfreezing={begin}", "training.warmup_steps=0"]
    result = train(changed(recipe, *settings), silent, [moved])
    assert moved.steps == [list(range(start, 9)) for start in first]
    plain = train(changed(recipe, "output=plain"), silent)
    assert result.metrics["trainable_parameters"] == plain.metrics["trainable_parameters"]


@pytest.mark.parametrize("step", [2, 7])
def test_unfreezing_goes_on_after_a_break_to_the_same_bits(recipe: Path, step: int) -> None:
    settings = [*UNFREEZING, "training.eval_strategy=steps", "training.eval_steps=2", "method.lora_dropout=0.5"]
    settings += ["training.layerwise_lr_decay=0.5"]
    through = train(changed(recipe, *settings, "output=through"), silent)
    assert same(saved(broken_and_resumed(changed(recipe, *settings), step)), saved(through))


class Rates(transformers.TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        found = kwargs["optimizer"].param_groups
        self.rates = {parameter: group["initial_lr"] for group in found for parameter in group["params"]}
        self.rates = {name: self.rates[p] for name, p in model.named_parameters() if p.requires_grad}


def test_rates_of_layers_and_of_loraplus_multiply(recipe: Path) -> None:
    found = Rates()
    settings = ["training.layerwise_lr_decay=0.5", "training.loraplus_lr_ratio=4.0"]
    train(changed(recipe, *settings), silent, [found])
    for name, rate in found.rates.items():
        k = 0 if name.startswith("classifier") else 1 if "layer.1." in name else 2
        faster = name.endswith((".B", ".bias"))
        assert rate == pytest.approx(0.01 * 0.5**k * (4 if faster else 1)), name


def test_one_place_is_refused(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "text.txt").write_text("the film was good\nthe meal is bad\n" * 20, encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"task: text-generation\nmodel: {llama}\ndata: {{train: text.txt}}\n"
        "method: {name: prompt_tuning, num_virtual_tokens: 2}\ntraining: {layerwise_lr_decay: 0.5}\noutput: run\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match="lies in one place"):
        train(changed(path), silent)


def test_layers_that_are_compared_train_at_once(recipe: Path) -> None:
    method = "method={name: adalora, init_r: 3, target_r: 2, total_step: 6, tinit: 1, tfinal: 1}"
    with pytest.raises(ConfigError, match="gradual_unfreezing: AdaLoraConfig compares all layers"):
        train(changed(recipe, method, "training.gradual_unfreezing=output"), silent)
