"""Merging where it could go wrong: tied weights, broken adapters, models that move, and the order of the verbs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from battery import Snapshot, close, far, run, same_bits
from models import Tiny, randomise
from torch import nn

from trimtab import AdapterError, LoraConfig, MergeError, get_peft_model, sites
from trimtab.adapter import Adapter


def lora(tiny: Tiny, targets: Any, **settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model = get_peft_model(tiny.model, LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": targets, **settings}))
    randomise(model)
    return model, tiny.inputs


# ------------------------------------------------------------------------------------------------------ tied weights

TIED = {
    "gpt2": (models.gpt2, "lm_head", "transformer.wte"),
    "llama": (lambda: models.llama(tie_word_embeddings=True), "lm_head", "model.embed_tokens"),
    "opt": (models.opt, "lm_head", "model.decoder.embed_tokens"),
    "t5": (lambda: models.t5(tie_word_embeddings=True), "lm_head", "encoder.embed_tokens"),
}


@pytest.mark.parametrize(("build", "head", "table"), TIED.values(), ids=TIED)
@pytest.mark.parametrize("on", ["head", "table", "both"])
def test_merging_into_one_of_two_tied_weights_leaves_the_other(
    build: Any, head: str, table: str, on: str, tmp_path: Path
) -> None:
    tiny = build()
    shared = tiny.model.get_submodule(table).weight
    assert tiny.model.get_submodule(head).weight is shared
    kept, before = shared.detach().clone(), Snapshot.of(tiny.model, tiny.inputs)
    model, inputs = lora(tiny, {"head": [head], "table": [table], "both": [head, table]}[on])
    active = run(model, inputs)
    far(active, before.output)
    model.merge_adapter()
    close(run(model, inputs), active)
    other = {"head": table, "table": head}.get(on)
    if other:
        assert model.get_submodule(other).weight is shared
    assert same_bits(shared, kept)
    model.unmerge_adapter()
    assert model.get_submodule(head).weight is model.get_submodule(table).weight is shared
    model.unload()
    before.holds(model, inputs)

    model, _ = lora(tiny, {"head": [head], "table": [table], "both": [head, table]}[on])
    active = run(model, inputs)
    merged = model.merge_and_unload()
    expected = run(merged, inputs)
    close(expected, active)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    close(run(again, inputs), expected)
    if again.config.model_type != "t5":  # whose config always says that they are tied, and compares them on loading
        assert again.config.tie_word_embeddings is False


@pytest.mark.parametrize(("build", "targets"), [(models.gpt2, "c_attn"), (models.t5, "q")], ids=["gpt2", "t5"])
def test_merging_elsewhere_keeps_the_tie(build: Any, targets: str, tmp_path: Path) -> None:
    tiny = build()
    tied = tiny.model.config.tie_word_embeddings
    assert tied
    model, inputs = lora(tiny, [targets])
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is True
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    expected = run(merged, inputs)
    merged.save_pretrained(tmp_path)
    close(run(type(merged).from_pretrained(tmp_path).eval(), inputs), expected)


def test_tied_layers_of_a_plain_model() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.tanh(self.a(x)))

    torch.manual_seed(0)
    model, inputs = lora(Tiny(Tied(), {"x": torch.randn(3, 4)}), ["b"])
    active, first = run(model, inputs), model.a.weight.detach().clone()
    merged = model.merge_and_unload()
    close(run(merged, inputs), active)
    assert same_bits(merged.a.weight, first)


# --------------------------------------------------------------------------------------------------- what is refused


def test_a_safe_merge_refuses_weights_that_are_not_finite() -> None:
    model, inputs = lora(models.mlp(), ["first", "second"])
    with torch.no_grad():
        model.second.adapters["default"].B[0, 0] = float("nan")
    before = Snapshot.of(model, inputs)
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"^second: the merged weight would not be finite"):
            verb(safe_merge=True)
        after = Snapshot.of(model, inputs)
        assert after.parameters == before.parameters
        assert after.attributes == before.attributes
    model.merge_adapter()  # without being asked to check, it merges


def test_a_method_that_is_not_linear_cannot_be_merged() -> None:
    class Gate(Adapter):
        def after(self, site: nn.Module, x: Any, y: Any) -> Any:
            return y * x.mean().sigmoid()

    model, inputs = lora(models.mlp(), ["first", "second"])
    sites.add(model.second, model, "default", Gate(), model.second._active)
    before = Snapshot.of(model, inputs)
    with pytest.raises(MergeError, match=r"^second: Gate cannot be folded into a weight: it is no linear map"):
        model.merge_adapter()
    before.holds(model, inputs)


def test_merged_adapters_must_be_unmerged_before_others_act() -> None:
    model, inputs = lora(models.mlp(), ["first"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["first"]))
    model.merge_adapter()
    merged = run(model, inputs)
    for verb in (
        model.merge_adapter,
        lambda: model.set_adapter("second"),
        lambda: model.delete_adapter("default"),
        lambda: model.add_adapter("third", LoraConfig(target_modules=["head"])),
    ):
        with pytest.raises(AdapterError, match=r"'default'.* merged .*call unmerge_adapter\(\) first"):
            verb()
    assert same_bits(run(model, inputs), merged)
    model.unmerge_adapter()
    model.set_adapter("second")


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_an_unknown_name_is_named_with_the_closest(verb: str) -> None:
    model, inputs = lora(models.mlp(), ["first"])
    before = Snapshot.of(model, inputs)
    with pytest.raises(AdapterError, match=r"There is no adapter 'defualt'. Did you mean 'default'"):
        getattr(model, verb)(adapter_names=["defualt"])
    before.holds(model, inputs)


# --------------------------------------------------------------------------------------------------- while merged


def test_merging_an_adapter_that_is_not_active() -> None:
    """It acts from the weights, together with what is active."""
    model, inputs = lora(models.mlp(), ["first"])
    model.add_adapter("second", LoraConfig(r=3, target_modules=["second"]))
    randomise(model, seed=4)
    model.set_adapter(["default", "second"])
    both = run(model, inputs)
    model.set_adapter("default")
    model.merge_adapter(["second"])
    close(run(model, inputs), both)
    model.unmerge_adapter()
    far(run(model, inputs), both)
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    close(run(merged, inputs), both)


def test_the_base_follows_a_model_that_is_cast_while_merged() -> None:
    model, inputs = lora(models.mlp(), ["first", "second"], modules_to_save=["head"])
    expected = run(model.double(), {"x": inputs["x"].double()})
    model.float().merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    close(run(model, {"x": inputs["x"].double()}), expected)


def test_unmerging_twice_or_what_is_not_merged_changes_nothing() -> None:
    model, inputs = lora(models.mlp(), ["first"])
    before = Snapshot.of(model, inputs)
    model.unmerge_adapter()
    model.merge_adapter()
    model.unmerge_adapter()
    model.unmerge_adapter()
    before.holds(model, inputs)


def test_a_merged_model_deepcopies() -> None:
    import copy

    model, inputs = lora(models.mlp(), ["first", "second"], modules_to_save=["head"])
    active = run(model, inputs)
    model.merge_adapter()
    copied = copy.deepcopy(model)
    copied.unmerge_adapter()
    assert same_bits(run(copied, inputs), active)
    copied.unload()
    assert same_bits(run(copied, inputs), run(models.mlp().model, inputs))
    model.unmerge_adapter()
    assert same_bits(run(model, inputs), active)


def test_the_state_dict_of_a_merged_model_has_the_same_keys() -> None:
    model, _ = lora(models.mlp(), ["first", "second"], modules_to_save=["head"], bias="all")
    keys = list(model.state_dict())
    model.merge_adapter()
    assert list(model.state_dict()) == keys


def test_a_model_read_from_gguf_can_be_saved_once_merged(tmp_path: Path) -> None:
    """transformers marks it as quantized, though its weights are floats: what counts is the layers, not the mark."""
    from transformers import AutoModelForCausalLM, GgufConfig

    model, inputs = models.llama()
    model.config.quantization_config = GgufConfig()
    quantizer = SimpleNamespace(quantization_config=model.config.quantization_config)
    model.is_quantized, model.hf_quantizer, model.quantization_method = True, quantizer, "gguf"
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "refused")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
    randomise(adapted)
    active = run(adapted, inputs)
    merged = adapted.merge_and_unload()  # without a warning about rounding, which would be an error here
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    close(run(loaded, inputs), active)
