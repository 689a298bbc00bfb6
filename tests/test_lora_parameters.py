"""LoRA on parameters that are no layer's weight, against W_e + s B_e A_e, and what is refused."""

import copy
import re
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from battery import close, far, run, same_bits
from models import Experts, randomise
from torch import Tensor, nn

from trimtab import AdapterError, ConfigError, LoraConfig, MergeError, TargetError, get_peft_model
from trimtab.checkpoint import describe
from trimtab.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from trimtab.targets import PartialTargetWarning, expert_parameters

SETTINGS: dict[str, Any] = {"r": 2, "lora_alpha": 5, "target_parameters": ["up", "down", "mixed"]}


def attached(is_transposed: bool = False, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    model, inputs = models.experts(is_transposed)
    model = get_peft_model(model, LoraConfig(**{**SETTINGS, **settings}))
    randomise(model)
    return model, inputs


def expected(model: Any, is_transposed: bool) -> dict[str, Tensor]:
    """The parameters with the adapter in them: expert e has rows e r to e r + r of A, and of B each E-th column."""
    found, adapter = {}, model[0].adapters["default"]
    for number, name in enumerate(("up", "down", "mixed")):
        stored, pair = model[0]._parameters[name].detach().double(), adapter.pairs[number]
        A, B = pair.A.detach().double(), pair.B.detach().double()
        if name == "mixed":
            found[name] = stored + 5 / 2 * B @ A
            continue
        changes = [5 / 2 * B[:, e::3] @ A[2 * e : 2 * e + 2] for e in range(3)]  # (out, in) each
        found[name] = stored + torch.stack([change.T if is_transposed else change for change in changes])
    return found


@pytest.mark.parametrize("is_transposed", [False, True])
def test_each_expert_has_a_pair_of_its_own(is_transposed: bool) -> None:
    model, inputs = attached(is_transposed)
    shapes = [(tuple(pair.A.shape), tuple(pair.B.shape)) for pair in model[0].adapters["default"].pairs]
    assert shapes == [((6, 5), (7, 6)), ((6, 7), (5, 6)), ((2, 5), (4, 2))]
    plain = models.experts(is_transposed).model.double()
    before = run(plain, {"input": inputs["input"].double()})
    for name, value in expected(model, is_transposed).items():
        plain[0]._parameters[name].data = value
    after = run(plain, {"input": inputs["input"].double()})
    far(before, after)
    close(run(model, inputs), after.float())


@pytest.mark.parametrize("is_transposed", [False, True])
def test_merging_puts_the_sums_in_place(is_transposed: bool) -> None:
    model, inputs = attached(is_transposed)
    stored = {name: value.detach().clone() for name, value in model[0]._parameters.items()}
    active, sums = run(model, inputs), expected(model, is_transposed)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged[0]) is Experts
    for name, value in sums.items():
        close(merged[0].get_parameter(name), value.float())
    close(run(merged, inputs), active)
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(same_bits(value, stored[name]) for name, value in model[0]._parameters.items())


def test_who_reads_a_parameter_from_outside_gets_the_sum() -> None:
    model, _ = attached()
    for name, value in expected(model, False).items():
        close(getattr(model[0], name).detach(), value.float())
        with model.disable_adapter():
            assert getattr(model[0], name) is model[0]._parameters[name]
    assert "up" not in vars(model[0])


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model, inputs = attached()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 6, 4))
    assert not {"up", "down", "mixed"} & vars(model[0]).keys()
    run(model, inputs)


def test_only_parameters_where_no_modules_are_named() -> None:
    model, _ = models.mixtral()
    model = get_peft_model(model, LoraConfig(r=2, target_parameters=["experts.down_proj"]))
    learns = [name for name, value in model.named_parameters() if value.requires_grad]
    assert len(learns) == 4
    assert all("mlp.experts.adapters.default.pairs.0." in name for name in learns)
    assert model.peft_config["default"].target_modules == []


def test_layers_and_patterns_count_for_parameters() -> None:
    model, _ = models.mixtral()
    config = LoraConfig(r=2, lora_alpha=4, target_parameters=["gate_up_proj", "down_proj"], layers_to_transform=[1],
                        rank_pattern={"experts.down_proj": 3}, alpha_pattern={"gate_up_proj": 7})  # fmt: skip
    model = get_peft_model(model, config)
    pairs = model.model.layers[1].mlp.experts.adapters["default"].pairs
    assert [(pair.name, len(pair.A) // 4, pair.scale) for pair in pairs] == [
        ("gate_up_proj", 2, 7 / 2), ("down_proj", 3, 4 / 3)]  # fmt: skip
    assert not hasattr(model.model.layers[0].mlp.experts, "adapters")


@pytest.mark.parametrize("build", [models.mixtral, models.gpt_oss])
def test_rows_of_experts_and_a_gradient_for_each(build: Any) -> None:
    """Tokens of all rows come to the experts in one dimension; each row's adapter gets the gradient of its own."""
    model, inputs = build()
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    model = get_peft_model(model, config, "a")
    model.add_adapter("b", config)
    randomise(model)
    model.set_requires_grad(["a", "b"])
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"]])
    model(input_ids=ids, adapter_names=["a", "b", "b", "a"]).logits.square().sum().backward()
    mixed = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    assert len(mixed) == 2 * 2 * 6
    for name, rows in (("a", [0, 3]), ("b", [1, 2])):
        model.zero_grad()
        model.set_adapter(name)
        model(input_ids=ids[rows]).logits.square().sum().backward()
        own = {path: value.grad for path, value in model.named_parameters() if value.grad is not None}
        assert len(own) == 2 * 6
        for path, grad in own.items():
            torch.testing.assert_close(mixed[path], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


def test_tokens_that_cannot_be_told_apart_are_refused() -> None:
    model, inputs = attached()
    with pytest.raises(AdapterError, match="which of it is whose cannot be told"), model.route(["default"] * 5):
        model[0](inputs["input"])


REFUSED = [
    ({"target_parameters": ["upp"]}, TargetError, "matches no parameter of Sequential. Closest: up."),
    ({"target_parameters": []}, ConfigError, "target_parameters=[]"),
    ({"target_parameters": ["inner.bias"]}, TargetError, "0.inner.bias is (5,) of torch.float32."),
    ({"target_modules": ["inner"], "target_parameters": ["inner.weight"]}, TargetError, "0.inner.weight: its module"),
    (
        {"r": 5},
        ConfigError,
        "0.mixed has a rank of 4 at most: 5 is too much. Closest: 4, or for these alone rank_pattern={'0.mixed': 4}.",
    ),
    ({"lora_dropout": 0.1}, ConfigError, "lora_dropout=0.1 needs a layer"),
    ({"use_dora": True}, ConfigError, "use_dora=True needs a layer"),
    ({"init_lora_weights": "pissa"}, ConfigError, "init_lora_weights='pissa' needs a layer"),
    ({"alora_invocation_tokens": [3]}, ConfigError, "alora_invocation_tokens=[3] needs a layer"),
    ({"rank_pattern": {"upp": 1}}, ConfigError, "rank_pattern has the key 'upp', which matches no target."),
]


@pytest.mark.parametrize(("settings", "kind", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused(settings: dict[str, Any], kind: type[Exception], said: str) -> None:
    model = models.experts().model
    with pytest.raises(kind, match=re.escape(said)):
        get_peft_model(model, LoraConfig(**{**SETTINGS, **settings}))
    assert not hasattr(model[0], "adapters")


def test_an_lstm_is_refused_since_it_would_not_see_the_change() -> None:
    with pytest.raises(TargetError, match="a LSTM does not look its parameters up by name"):
        get_peft_model(nn.Sequential(nn.LSTM(4, 4)), LoraConfig(r=1, target_parameters=["weight_ih_l0"]))


def test_parameters_that_are_no_floats_are_refused() -> None:
    model = models.experts().model
    model[0].up.requires_grad_(False)
    model[0].up.data = model[0].up.data.to(torch.int8)
    with pytest.raises(TargetError, match=re.escape("0.up is (3, 7, 5) of torch.int8")):
        get_peft_model(model, LoraConfig(**SETTINGS))


def test_all_linear_says_what_it_leaves_out() -> None:
    model = models.mixtral().model
    experts = [f"model.layers.{n}.mlp.experts.{name}" for n in (0, 1) for name in ("gate_up_proj", "down_proj")]
    assert expert_parameters(model) == experts
    with pytest.warns(PartialTargetWarning, match=re.escape("target_parameters=['down_proj', 'gate_up_proj']")):
        get_peft_model(model, LoraConfig(target_modules="all-linear"))
    both = LoraConfig(r=2, target_modules="all-linear", target_parameters=["down_proj", "gate_up_proj"])
    get_peft_model(models.mixtral().model, both)  # warnings are errors here
    assert expert_parameters(models.vit().model) == []


def test_combining_them_is_refused() -> None:
    model, _ = attached()
    with pytest.raises(MergeError, match="it changes parameters by name"):
        model.add_weighted_adapter(["default"], [0.5], "less")
    with pytest.raises(MergeError, match="it changes parameters by name"):
        model.convert_to_lora(1.0)


def test_optimizers_of_lora_know_their_pairs() -> None:
    model, _ = attached()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    for pair in model[0].adapters["default"].pairs:
        assert (rates[id(pair.A)], rates[id(pair.B)]) == (1e-3, 16e-3)
    with pytest.raises(ConfigError, match="of experts"):
        create_lorafa_optimizer(model, r=2, lora_alpha=5, lr=1e-3)


def test_what_is_in_a_folder_tells_parameters_apart(tmp_path: Path) -> None:
    model, _ = attached()
    model.save_pretrained(tmp_path)
    assert describe(tmp_path).sites == {
        "0": {
            "base_layer.base_layer.lora_A.weight": (6, 5),
            "base_layer.base_layer.lora_B.weight": (7, 6),
            "base_layer.lora_A.weight": (6, 7),
            "base_layer.lora_B.weight": (5, 6),
            "lora_A.weight": (2, 5),
            "lora_B.weight": (4, 2),
        }
    }


def test_a_layer_inside_such_a_module_has_hf_peft_s_key(tmp_path: Path) -> None:
    model, _ = attached(target_modules=["inner"], target_parameters=["up", "down"])
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.0.base_layer.base_layer.inner.lora_A.weight" in keys
