"""The verbs on adapters: what they refuse, what they report, and that a refusal changes nothing."""

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from battery import Snapshot, run, same_bits
from models import randomise
from torch import nn

import trimtab
from trimtab import (
    AdapterError,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TargetError,
    VeraConfig,
    attach,
    get_peft_model,
)
from trimtab.model import AdapterStatus

CONFIG = LoraConfig(r=2, target_modules=["first"], modules_to_save=["head"])


def adapted() -> tuple[Any, dict[str, torch.Tensor]]:
    model, inputs = models.mlp()
    randomise(get_peft_model(model, CONFIG))
    return model, inputs


def test_the_model_stays_the_object_that_it_was() -> None:
    model, _ = models.mlp()
    first = model.first
    assert get_peft_model(model, CONFIG) is model
    assert model.get_base_model() is model
    assert model.first is first
    assert isinstance(model, models.Mlp)
    assert isinstance(model, trimtab.PeftModel)
    assert model.unload() is model
    assert not isinstance(model, trimtab.PeftModel)


def test_attaching_twice_is_refused() -> None:
    model, inputs = adapted()
    before = Snapshot.of(model, inputs)
    with pytest.raises(AdapterError, match=r"Mlp has adapters already. Use model.add_adapter"):
        get_peft_model(model, CONFIG)
    with pytest.raises(AdapterError, match="There is an adapter 'default' already"):
        model.add_adapter("default", CONFIG)
    before.holds(model, inputs)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "keys", "training", "_modules"])
def test_names_that_cannot_name_a_module_or_a_folder(name: str) -> None:
    model, inputs = models.mlp()
    before = Snapshot.of(model, inputs)
    with pytest.raises(AdapterError, match="cannot be an adapter's name"):
        get_peft_model(model, CONFIG, name)
    before.holds(model, inputs)


@pytest.mark.parametrize("verb", ["set_adapter", "delete_adapter"])
def test_an_unknown_name_is_named_with_the_closest(verb: str) -> None:
    model, inputs = adapted()
    before = Snapshot.of(model, inputs)
    with pytest.raises(AdapterError, match=r"There is no adapter 'defualt'\. Did you mean 'default'\?"):
        getattr(model, verb)("defualt")
    before.holds(model, inputs)


def test_a_model_without_adapters_says_so() -> None:
    with pytest.raises(AdapterError, match=r"Mlp has no adapters. Attach one with get_peft_model"):
        attach.trunk(models.mlp().model)


def test_two_trained_copies_of_one_module_cannot_act_together() -> None:
    model, inputs = adapted()
    model.add_adapter("second", CONFIG)
    before = Snapshot.of(model, inputs)
    with pytest.raises(AdapterError, match="'default' and 'second' both replace head: they cannot act together"):
        model.set_adapter(["default", "second"])
    before.holds(model, inputs)


def test_deleting_one_of_two_active_adapters_leaves_the_other_acting() -> None:
    model, inputs = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["first", "second"]))
    randomise(model, seed=4)
    model.set_adapter("second")
    expected = run(model, inputs)
    model.set_adapter(["default", "second"])
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert model.active_adapter == "second"
    assert same_bits(run(model, inputs), expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.adapters.second.{end}" for layer in ("first", "second") for end in "AB"
    }


def test_the_one_active_adapter() -> None:
    model, _ = adapted()
    assert model.active_adapter == "default"
    model.add_adapter("second", LoraConfig(r=2, target_modules=["second"]))
    model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match="2 adapters are active"):
        model.active_adapter  # noqa: B018


def test_the_status_of_every_site() -> None:
    model, _ = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["first", "second"], inference_mode=True))
    model.set_adapter(["default", "second"])
    status = {site.name: site for site in model.get_layer_status()}
    assert set(status) == {"first", "second", "head"}
    first = status["first"]
    assert first.module_type == "Linear"
    assert first.enabled
    assert first.active_adapters == ["default", "second"]
    assert first.available_adapters == ["default", "second"]
    assert first.requires_grad == {"default": True, "second": False}
    assert first.merged_adapters == []
    assert status["head"].active_adapters == ["default"]
    assert first.devices == {"default": ["cpu"], "second": ["cpu"]}
    model.merge_adapter()
    assert model.get_layer_status()[0].merged_adapters == ["default", "second"]
    model.unmerge_adapter()
    with model.disable_adapter():
        assert not model.get_layer_status()[0].enabled


def test_what_is_loaded() -> None:
    """Numbers and bytes by hand: 2 x (5 + 7) and a head of 6 x 3 + 3 in float32; VeRA's matrices are no parameters."""
    model, _ = adapted()
    vera = VeraConfig(r=6, target_modules=["first", "second"], inference_mode=True)
    model.add_adapter("second", vera)
    first, second = model.adapters()
    assert first == AdapterStatus("default", "LORA", 45, 180, active=True, merged=False, requires_grad=True)
    parameters, matrices = 6 + 7 + 6 + 6, 6 * 7 + 7 * 6  # A and B as wide as the widest site
    size = 4 * (parameters + matrices)
    assert second == AdapterStatus("second", "VERA", parameters, size, active=False, merged=False, requires_grad=False)
    model.set_adapter(["default", "second"])
    model.merge_adapter(["second"])
    assert [(status.active, status.merged) for status in model.adapters()] == [(True, False), (True, True)]


def test_a_prompt_at_the_root_is_listed_and_removed() -> None:
    """There the site's `adapters` and the model's are on one object."""
    model, inputs = models.gpt2()
    before = run(model, inputs)
    get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert [(status.name, status.parameters) for status in model.adapters()] == [("default", 3 * 16)]
    model.unload()
    assert same_bits(run(model, inputs), before)


def test_a_model_with_adapters_of_its_own_is_refused() -> None:
    class Own(models.Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.adapters = nn.ModuleList()

    model = Own()
    with pytest.raises(TargetError, match=r"The model \(Own\) has something called `adapters` of its own"):
        get_peft_model(model, CONFIG)
    assert type(model) is Own


def test_adapters_in_the_base_s_precision_where_asked_for() -> None:
    model, _ = models.mlp()
    get_peft_model(model.bfloat16(), CONFIG, autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_new_adapter_takes_the_mode_of_its_site() -> None:
    """Dropout in a model that is in eval mode must stay off."""
    for training in (True, False):
        model, _ = models.mlp()
        get_peft_model(model.train(training), CONFIG)
        assert {module.training for module in model.modules()} == {training}


def test_a_trained_copy_starts_from_the_base_whatever_acts() -> None:
    model, inputs = adapted()
    model.add_adapter("second", CONFIG)
    model.set_adapter("second")
    assert same_bits(run(model, inputs), run(models.mlp().model, inputs))


def test_disabling_ends_with_the_block_also_after_an_error() -> None:
    model, inputs = adapted()
    active = run(model, inputs)
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        expected = run(model, inputs)
        with pytest.raises(ZeroDivisionError), model.disable_adapter():
            raise ZeroDivisionError
        assert same_bits(run(model, inputs), expected)
    model.unmerge_adapter()
    assert same_bits(run(model, inputs), active)


def convolutional() -> nn.Sequential:
    """With running statistics that are not those of the inputs below."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True))
    for norm in net[1:]:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return net


def test_training_leaves_the_statistics_of_a_frozen_norm(tmp_path: Path) -> None:
    net, x = convolutional(), torch.randn(3, 2, 9)
    base, classes = copy.deepcopy(net), [type(module) for module in net]
    model: Any = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], bias="all"))  # a norm is a site as well
    for start in (net, net[1]):  # whichever is told to train
        start.train()
        model(x).square().sum().backward()
        assert not net[1].training
        assert net[1].adapters["default"].training
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    trained = model(x)
    torch.testing.assert_close(model.eval()(x), trained)  # it was trained as it predicts
    model.save_pretrained(tmp_path)
    other: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(other.eval()(x), trained)
    model.train().unload()
    assert [type(module) for module in net] == classes
    for name, value in base.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    net(x)
    assert not torch.equal(net[1].running_mean, base[1].running_mean)  # without adapters it is as it was


def test_a_trained_copy_of_a_norm_counts_statistics_of_its_own(tmp_path: Path) -> None:
    for first in (None, LoraConfig(r=2, target_modules=["0"])):
        net, x = convolutional(), torch.randn(3, 2, 9)
        base = copy.deepcopy(net)
        config = LNTuningConfig(target_modules=["1"])
        model: Any = get_peft_model(net, first or config)
        if first:  # its norms are frozen when they are copied
            model.add_adapter("other", config)
            model.set_adapter("other")
        model(x)
        [copied] = net[1].adapters[model.active_adapter].children()
        expected = base[1].running_mean * 0.9 + base[0](x).mean((0, 2)) * 0.1
        torch.testing.assert_close(copied.running_mean, expected)
        assert torch.equal(net[1].running_mean, base[1].running_mean)
        found = model.eval()(x)
        model.save_pretrained(tmp_path)
        folder = tmp_path / "other" if first else tmp_path
        other: Any = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        torch.testing.assert_close(other.eval()(x), found)
        torch.testing.assert_close(model.merge_and_unload()(x), found)


def test_a_chain_of_layers_stays_one_while_its_copy_is_trained() -> None:
    """nn.Sequential calls whatever it finds in itself, such as the adapters there."""
    net = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))})
    net.forward = lambda x: net["head"](net["body"](x))  # type: ignore[method-assign]
    x, head, last = torch.randn(3, 4), net["head"], net["head"][-1]
    before = net(x)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    assert torch.equal(model(x), before)
    copied = [value for value in model.parameters() if value.requires_grad and value.shape == (2,)]
    with torch.no_grad():
        copied[0].add_(1.0)
    torch.testing.assert_close(model(x), before + 1)
    assert len(head) == 3
    assert list(head)[-1] is head[-1] is last
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    assert torch.equal(model.unload()(x), before)
