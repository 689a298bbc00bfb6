"""Unions: several methods as one adapter; MAM and UniPELT by their formulas; what cannot go together."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from battery import close, far, run, same_bits
from models import randomise
from torch import nn

from trimtab import (
    AdaLoraConfig,
    AdapterError,
    BottleneckConfig,
    CheckpointError,
    ConfigError,
    IA3Config,
    LoraConfig,
    MamConfig,
    MergeError,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TargetError,
    UnionConfig,
    UniPeltConfig,
    get_peft_model,
    sites,
)
from trimtab import recipe as recipes
from trimtab.checkpoint import describe
from trimtab.training import train

LORA = LoraConfig(r=2, lora_alpha=6, target_modules=["first", "second"])
IA3 = IA3Config(target_modules=["first"], feedforward_modules=[])


def pair() -> list[PeftConfig]:
    return [LORA.model_copy(), IA3.model_copy()]


def test_a_list_of_configs_is_one_adapter() -> None:
    model, inputs = models.mlp()
    get_peft_model(model, pair())
    randomise(model)
    assert list(model.peft_config) == ["default"]
    lora, ia3 = model.first.adapters["default"].parts()
    W, b, x = model.first.weight, model.first.bias, inputs["x"]
    # IA3 is second, so that it scales what LoRA has made of the layer
    close(model.first(x), (x @ (W + 3 * lora.B @ lora.A).T + b) * ia3.scale.flatten())
    assert isinstance(model.peft_config["default"], UnionConfig)


def test_a_union_acts_as_its_parts_do_together() -> None:
    model, inputs = models.mlp()
    get_peft_model(model, pair())
    randomise(model)
    together = run(model, inputs)
    parts = {path: model.get_submodule(path).adapters["default"].parts() for path in ("first", "second")}
    other, _ = models.mlp()
    get_peft_model(other, LORA, "lora")
    other.add_adapter("ia3", IA3)
    for path, (lora, *_) in parts.items():
        other.get_submodule(path).adapters["lora"].load_state_dict(lora.state_dict())
    other.first.adapters["ia3"].load_state_dict(parts["first"][1].state_dict())
    other.set_adapter(["lora", "ia3"])
    assert same_bits(run(other, inputs), together)
    far(run(other.set_adapter("lora") or other, inputs), together)


def test_two_adapters_of_different_methods_act_at_once_and_one_is_merged() -> None:
    model, inputs = models.gpt2()
    get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"]), "lora")
    model.add_adapter("prefix", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model.add_adapter("neck", BottleneckConfig(reduction_factor=4))
    randomise(model)
    model.set_adapter(["lora", "prefix", "neck"])
    active = run(model, inputs)
    for left_out in ("lora", "prefix", "neck"):
        model.set_adapter([name for name in ("lora", "prefix", "neck") if name != left_out])
        far(run(model, inputs), active)
    model.set_adapter(["lora", "prefix", "neck"])
    model.merge_adapter(["lora"])
    close(run(model, inputs), active)


def test_one_folder_holds_a_union(tmp_path: Path) -> None:
    model, inputs = models.mlp()
    get_peft_model(model, UnionConfig(methods=pair(), modules_to_save=["head"]))
    randomise(model)
    active = run(model, inputs)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert [part["peft_type"] for part in saved["methods"]] == ["LORA", "IA3"]
    found = describe(tmp_path)
    assert found.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    fresh, _ = models.mlp()
    PeftModel.from_pretrained(fresh, tmp_path, "other")
    assert same_bits(run(fresh, inputs), active)
    assert [part.peft_type for part in fresh.peft_config["other"].methods] == ["LORA", "IA3"]
    saved["methods"][0]["r"] = 3
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match=r"0\..*first\.lora_A\.weight is \(2, 5\) in the file, \(3"):
        PeftModel.from_pretrained(models.mlp().model, tmp_path)
    saved["methods"][0]["peft_type"] = "LORAA"
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match=r"'LORAA'.* Did you mean 'LORA'"):
        PeftModel.from_pretrained(models.mlp().model, tmp_path)


def test_methods_that_take_part_in_training_do_so_in_a_union(tmp_path: Path) -> None:
    """AdaLoRA's ranks fall on schedule, and are saved and loaded."""
    schedule = {"init_r": 4, "target_r": 1, "tinit": 0, "tfinal": 2, "deltaT": 1, "total_step": 6}
    ada = AdaLoraConfig(target_modules=["first", "second"], **schedule)
    model, inputs = models.mlp()
    get_peft_model(model, [ada, IA3.model_copy()])
    randomise(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(6):
        (model(**inputs).square().mean() + model.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    left = {path: model.get_submodule(path).adapters["default"].parts()[0].E for path in ("first", "second")}
    assert sum(int((E != 0).sum()) for E in left.values()) == 2  # of 2 sites, target_r each
    model.eval()
    active = run(model, inputs)
    model.save_pretrained(tmp_path)
    fresh, _ = models.mlp()
    PeftModel.from_pretrained(fresh, tmp_path)
    close(run(fresh, inputs), active)


def test_what_cannot_go_together() -> None:
    prompt = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    prefix = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    lora = LoraConfig(r=2, target_modules=["c_attn"])
    cases: list[tuple[Any, list[PeftConfig], type[Exception], str]] = [
        (models.gpt2, [prompt, prefix], ConfigError, "PROMPT_TUNING and PREFIX_TUNING both put virtual tokens before"),
        (models.mlp, [LORA, LoraConfig(target_modules=["secnd"])], TargetError, "Closest: second"),
        (models.gpt2, UnionConfig(methods=[prompt], gated=True), ConfigError, "of prompts only prefix tuning does"),
    ]
    for build, config, kind, message in cases:
        model = build().model
        with pytest.raises(kind, match=message):
            get_peft_model(model, config)
        assert not isinstance(model, PeftModel)
    with pytest.raises(ConfigError, match="methods"):
        UnionConfig(methods=[])
    model = get_peft_model(models.gpt2().model, [prompt, lora])
    with pytest.raises(MergeError, match="Prompt changes what goes into a module"):
        model.merge_adapter()
    model.add_adapter("second", [prefix, lora])
    with pytest.raises(AdapterError, match="all put virtual tokens before the input"):
        model.set_adapter(["default", "second"])


# Gates


def gates(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "Gate"}


def test_a_gate_says_how_much_a_method_acts() -> None:
    model, _ = models.mlp()
    get_peft_model(model, UnionConfig(methods=[LORA.model_copy()], gated=True))
    randomise(model)
    [gated] = model.first.adapters["default"].parts()
    x = torch.randn(3, 7, 5)
    W, b = model.first.weight, model.first.bias
    A, B, w, c = gated.adapter.A, gated.adapter.B, gated.gate.weight, gated.gate.bias
    g = torch.stack([1 / (1 + torch.exp(-(row @ w.T + c))) for row in x]).mean(1, keepdim=True)  # (3, 1, 1)
    close(model.first(x), x @ W.T + b + g * 3 * (x @ A.T @ B.T))


@pytest.mark.parametrize("build", [models.gpt2, models.bert, models.llama, models.opt, models.t5])
def test_closed_gates_shut_every_method_out(build: Any) -> None:
    """LoRA and the adapters give the base's outputs; of the prefix nothing but its place in the softmax is left."""
    model, inputs = build()
    base = run(model, inputs)
    get_peft_model(model, UniPeltConfig(num_virtual_tokens=3, r=2, reduction_factor=4))
    randomise(model)
    active = run(model, inputs)
    far(active, base)
    own = gates(model)
    lora = [gate for name, gate in own.items() if "by_method.1" in name]
    necks = [gate for name, gate in own.items() if "by_method.2" in name]
    prefix = [gate for name, gate in own.items() if "by_method.0" in name]
    assert lora and necks and prefix
    for gate in own.values():
        nn.init.constant_(gate.bias, -200.0)
    shut = run(model, inputs)
    for _, adapter in model.named_modules():
        if type(adapter).__name__ == "Prefix":  # zero keys and values are what shut gates make of them
            nn.init.zeros_(adapter.embedding)
    for gate in prefix:
        nn.init.constant_(gate.bias, 200.0)
    close(run(model, inputs), shut)
    model.unload()
    assert same_bits(run(model, inputs), base)


def test_a_gated_prefix_is_scaled_by_what_the_layer_reads() -> None:
    """Keys and values in the cache are g times the prefix's, and checkpointed layers, which have no cache, agree."""
    model, inputs = models.gpt2()
    union = UnionConfig(methods=[PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")], gated=True)
    get_peft_model(model, union)
    randomise(model)
    [prefix] = sites.adapters(model)["default"].parts()
    seen: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(model.transformer.h):
        block.attn.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: seen.update({layer: (args or [kwargs.get("hidden_states")])[0]}),
            with_kwargs=True,
        )
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    for layer, hidden in seen.items():
        gate = prefix.gates[layer]
        g = torch.sigmoid(hidden @ gate.weight.T + gate.bias).mean(1)[:, :, None, None]
        keys, values = prefix.states(len(hidden), hidden.dtype)[layer]
        close(cache.layers[layer].keys[:, :, :3], keys * g)
        close(cache.layers[layer].values[:, :, :3], values * g)
    model.train()
    plain = model(**inputs).logits
    model.activation_checkpointing_enable({"use_reentrant": False})
    close(model(**inputs).logits, plain)


def test_a_cache_that_the_base_has_filled_has_no_prefix_to_scale() -> None:
    model, inputs = models.gpt2()
    prefix = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    get_peft_model(model, UnionConfig(methods=[prefix], gated=True))
    randomise(model)
    ids = inputs["input_ids"]

    def rest(act: Any) -> torch.Tensor:
        with model.disable_adapter():
            cache = model(ids[:, :3], use_cache=True).past_key_values
        with torch.no_grad(), act():
            logits: torch.Tensor = model(ids[:, 3:], past_key_values=cache).logits
            return logits

    close(rest(nullcontext), rest(model.disable_adapter))


# Presets


def test_mam_is_a_prefix_and_parallel_adapters() -> None:
    model, inputs = models.opt()
    get_peft_model(model, MamConfig(num_virtual_tokens=3, encoder_hidden_size=7, reduction_factor=4))
    randomise(model)
    union = model.peft_config["default"]
    assert [part.peft_type for part in union.methods] == ["PREFIX_TUNING", "BOTTLENECK"]
    assert (union.methods[1].variant, union.methods[1].scaling) == ("parallel", 4)
    other, _ = models.opt()
    get_peft_model(other, [part.model_copy() for part in union.methods])
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" in k}, strict=False)
    assert same_bits(run(other, inputs), run(model, inputs))


def test_unipelt_is_three_methods_with_gates() -> None:
    model, _ = models.bert()
    get_peft_model(model, UniPeltConfig(num_virtual_tokens=3, r=2, reduction_factor=4))
    union = model.peft_config["default"]
    assert [part.peft_type for part in union.methods] == ["PREFIX_TUNING", "LORA", "BOTTLENECK"]
    assert union.gated
    layers = model.config.num_hidden_layers
    # of each layer one gate for the prefix, two for LoRA (query and value), one for the adapter
    assert len(gates(model)) == layers * 4


def test_a_recipe_takes_a_list(recipe: Path) -> None:
    text = recipe.read_text().replace("name: lora\n  r: 2\n  target_modules:\n  - query\n  - value\n", "METHOD")
    start, end = text.index("method:"), text.index("training:")
    methods = "method:\n- {name: lora, r: 2, target_modules: [query, value]}\n- bitfit\n"
    recipe.write_text(text[:start] + methods + text[end:])
    result = train(recipes.read(recipe), lambda _: None)
    found = PeftConfig.from_pretrained(result.folder)
    assert [part.peft_type for part in found.union_of()] == ["LORA", "BITFIT"]
    assert result.metrics["validation"]["loss"] < result.metrics["untrained"]["validation"]["loss"]
    recipe.write_text(text[:start] + "method:\n- {name: lora, rr: 2}\n" + text[end:])
    with pytest.raises(ConfigError, match=r"recipe.yaml:\d+: method.0 has no key 'rr'. Did you mean 'r'"):
        recipes.read(recipe)
    recipe.write_text(text[:start] + "method:\n- lorra\n" + text[end:])
    with pytest.raises(ConfigError, match=r"there is no 'lorra'. Did you mean 'lora'"):
        recipes.read(recipe)
