"""Which modules a config means, and that a setting which means nothing is said so and changes nothing."""

import warnings
from typing import Any

import models
import pytest
import torch
from battery import Snapshot
from torch import nn

from trimtab import ConfigError, LoraConfig, PartialTargetWarning, TargetError, get_peft_model, sites
from trimtab.adapter import TrainedCopy
from trimtab.targets import matches

TRANSFORMERS = pytest.mark.parametrize("build", models.TRANSFORMERS.values(), ids=models.TRANSFORMERS)


def adapted(model: nn.Module, *args: Any, **settings: Any) -> list[str]:
    """The names of the modules that got LoRA."""
    get_peft_model(model, *(args or [LoraConfig(r=2, **settings)]))
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, sites.AnySite)]
    return [name for name, m in found if not isinstance(m.adapters["default"], TrainedCopy)]


def copied(model: nn.Module) -> list[str]:
    """The names of the modules that are trained whole."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, sites.AnySite)]
    return [name for name, m in found if isinstance(m.adapters["default"], TrainedCopy)]


def hf_adapted(model: nn.Module, **settings: Any) -> list[str]:
    import peft
    from peft.tuners.lora import LoraLayer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    return [name for name, m in wrapped.base_model.model.named_modules() if isinstance(m, LoraLayer)]


def refused(error: type[Exception], match: str, model_and_inputs: Any = None, **settings: Any) -> None:
    """Assert that attaching fails with this message and leaves the model bit for bit as it was."""
    model, inputs = model_and_inputs or models.mlp()
    before = Snapshot.of(model, inputs)
    with pytest.raises(error, match=match):
        get_peft_model(model, LoraConfig(**settings))
    before.holds(model, inputs)


# ---------------------------------------------------------------------------------------------------- what is chosen


def test_an_entry_of_a_list_is_a_full_name_or_its_last_parts() -> None:
    layer = "bert.encoder.layer.1.attention.self.query"
    for entry in ("query", "self.query", "layer.1.attention.self.query", layer):
        assert matches(entry, layer)
    for entry in ("uery", "my.query", "attention", "bert", "bert.encoder", "elf.query", "q.*", ""):
        assert not matches(entry, layer)
    assert adapted(models.bert().model, target_modules=["1.attention.self.query"]) == [layer]
    assert adapted(models.bert().model, target_modules=[layer, "pooler.dense"]) == [layer, "bert.pooler.dense"]


def test_an_entry_never_matches_a_part_of_a_name() -> None:
    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("query", "my_query", "query_2", "querying"):
                self.add_module(name, nn.Linear(2, 2))

    assert adapted(Alike(), target_modules=["query"]) == ["query"]
    assert adapted(Alike(), target_modules="query") == ["query"]
    assert adapted(Alike(), target_modules=["query", "my_query"], exclude_modules=["query"]) == ["my_query"]
    assert adapted(Alike(), target_modules="my_query|query_2") == ["my_query", "query_2"]


def test_an_adapter_s_name_may_be_part_of_a_module_s() -> None:
    """Names are compared part by part, also where an adapter is called like a layer, its parameter or its site."""
    for name in ("first", "fir", "weight", "A", "mlp"):
        model, inputs = models.mlp()
        before = Snapshot.of(model, inputs)
        get_peft_model(model, LoraConfig(r=2, target_modules=["first"]), name)
        model.add_adapter("other", LoraConfig(r=3, target_modules=["first", "second"]))
        model.set_adapter(name)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            f"first.adapters.{name}.{end}" for end in "AB"
        }
        model.unload()
        before.holds(model, inputs)


def test_a_string_is_a_regular_expression_for_the_full_name() -> None:
    model = models.llama().model
    assert adapted(model, target_modules=r".*\.1\.self_attn\.[qk]_proj") == [
        "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj",
    ]  # fmt: skip
    refused(TargetError, "target_modules='q_proj' matches no module", models.llama(), target_modules="q_proj")


def test_what_lies_in_an_adapter_is_no_target() -> None:
    """A second adapter sees the model as it was."""
    model = models.mlp().model
    get_peft_model(model, LoraConfig(r=2, target_modules=["first"], modules_to_save=["head"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=".*", exclude_modules=["norm"]))
    assert list(model.get_layer_status()[0].requires_grad) == ["default", "second"]
    assert [s.name for s in model.get_layer_status() if "second" in s.available_adapters] == ["first", "head", "second"]


@TRANSFORMERS
def test_all_linear_is_hf_peft_s_choice(build: Any) -> None:
    ours = adapted(build().model, target_modules="all-linear")
    assert sorted(ours) == sorted(hf_adapted(build().model, target_modules="all-linear"))


@pytest.mark.parametrize("build", [models.bert, models.vit], ids=["bert", "vit"])
def test_all_linear_with_a_head_that_is_trained_whole(build: Any) -> None:
    model = build().model
    ours = adapted(model, target_modules="all-linear", modules_to_save=["classifier"])
    assert copied(model) == ["classifier"]
    assert ours
    assert "classifier" not in ours


def test_all_linear_of_a_plain_model() -> None:
    assert adapted(models.mlp().model, target_modules="all-linear") == ["first", "second", "head"]
    assert adapted(models.convolutions().model, target_modules="all-linear") == ["head"]
    refused(TargetError, "has no linear layer", (nn.ReLU(), {"input": torch.ones(1)}), target_modules="all-linear")


def test_all_linear_is_written_out_so_that_it_means_the_same_elsewhere() -> None:
    model = models.llama().model
    get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert model.peft_config["default"].target_modules == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip


@pytest.mark.parametrize("name", models.TRANSFORMERS)
def test_no_targets_are_hf_peft_s_defaults(name: str) -> None:
    """Where its table has the model; ViT it has not, there query and value are our own choice."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    model = models.TRANSFORMERS[name]().model
    ours = adapted(model)
    if name == "vit":
        assert name not in DEFAULTS
        assert ours == [f"vit.layers.{i}.attention.{end}" for i in (0, 1) for end in ("q_proj", "v_proj")]
        return
    assert sorted(model.peft_config["default"].target_modules) == sorted(DEFAULTS[name])
    assert sorted(ours) == sorted(hf_adapted(models.TRANSFORMERS[name]().model))


def test_no_targets_in_a_model_without_attention() -> None:
    refused(TargetError, "target_modules=None means attention's query and value, which Mlp has under no known name")


@pytest.mark.parametrize("excluded", [["k_proj"], {"k_proj"}, "model.layers.0.*", ["0.self_attn.q_proj", "v_proj"]])
def test_excluded_modules_are_hf_peft_s_choice(excluded: Any) -> None:
    settings = {"target_modules": ["q_proj", "k_proj", "v_proj"], "exclude_modules": excluded}
    assert adapted(models.llama().model, **settings) == hf_adapted(models.llama().model, **settings)


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (models.llama, {"layers_to_transform": 1}),
        (models.llama, {"layers_to_transform": [0], "layers_pattern": "layers"}),
        (models.bert, {"layers_to_transform": [1], "layers_pattern": ["layer", "blocks"]}),
        (models.gpt2, {"layers_to_transform": [0, 1]}),
        (models.opt, {"layers_to_transform": [1], "layers_pattern": "layers"}),
    ],
)
def test_layers_to_transform_are_hf_peft_s_choice(build: Any, settings: dict[str, Any]) -> None:
    targets = {models.bert: ["query"], models.gpt2: ["c_attn"]}.get(build, ["q_proj"])
    ours = adapted(build().model, target_modules=targets, **settings)
    assert ours == hf_adapted(build().model, target_modules=targets, **settings)
    assert ours


def test_layers_are_counted_in_the_list_that_layers_pattern_names() -> None:
    """T5 numbers its blocks and the sub-layers in them."""
    settings = {"target_modules": ["q"], "layers_to_transform": [1]}
    blocks = adapted(models.t5().model, layers_pattern="block", **settings)
    assert blocks == [
        "encoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.q",
    ]
    assert adapted(models.t5().model, layers_pattern="layer", **settings) == [
        "decoder.block.0.layer.1.EncDecAttention.q", "decoder.block.1.layer.1.EncDecAttention.q",
    ]  # fmt: skip


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_the_head_of_a_classification_task_is_trained_whole(task: str) -> None:
    model = models.bert().model
    ours = adapted(model, target_modules="all-linear", task_type=task)
    assert copied(model) == ["classifier"]
    assert "classifier" not in ours
    assert model.peft_config["default"].modules_to_save == ["classifier"]


def test_the_head_is_added_to_what_is_saved_anyway() -> None:
    model = models.bert().model
    adapted(model, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["pooler", "classifier"])
    assert sorted(copied(model)) == ["bert.pooler", "classifier"]


def test_other_tasks_have_no_head_to_train() -> None:
    model = models.llama().model
    adapted(model, task_type="CAUSAL_LM")
    assert copied(model) == []
    assert model.peft_config["default"].modules_to_save is None


def test_a_module_is_trained_whole_or_adapted_not_both() -> None:
    model = models.bert().model
    ours = adapted(model, target_modules=["dense"], modules_to_save=["pooler"])
    assert "bert.pooler.dense" not in ours
    assert copied(model) == ["bert.pooler"]
    refused(TargetError, "no target is left", target_modules=["head"], modules_to_save=["head"])


# ------------------------------------------------------------------------------------- settings that match nothing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_prj"]}, r"target_modules=\['q_prj'\] matches no module of LlamaForCausalLM.*q_proj"),
        ({"target_modules": ["query", "valeu"]}, r"target_modules=\['query', 'valeu'\] matches no module"),
        ({"target_modules": r".*qproj"}, r"target_modules='.*qproj' matches no module.*Closest: q_proj"),
        ({"target_modules": []}, r"target_modules=\[\] matches no module"),
        ({"target_modules": "q_proj("}, "is no regular expression"),
        ({"target_modules": ["self_attn"]}, "self_attn is a LlamaAttention, which LoraConfig cannot adapt"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["k_prj"]}, r"exclude_modules=\['k_prj'\].*k_proj"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "no target is left"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, r"modules_to_save=\['lm_haed'\].*lm_head"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 7]}, r"layers \[7\]; the targets are in .*\[0, 1\]"),
        ({"target_modules": ["q_proj"], "layers_to_transform": -1}, r"names layers \[-1\]"),
        ({"target_modules": ["lm_head"], "layers_to_transform": [0]}, "none of the targets, for example lm_head"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
            "layers_pattern='blocks' matches none of the targets",
        ),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "it needs layers_to_transform beside it"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "is a regular expression: write the layers"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}}, "rank_pattern has the key 'k_proj'"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"q_prj": 2}}, r"alpha_pattern has the key 'q_prj'.*q_proj"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_setting_that_matches_nothing_is_an_error(settings: dict[str, Any], message: str) -> None:
    refused((TargetError, ConfigError), message, models.llama(), **settings)


@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules", "modules_to_save"])
def test_a_list_that_matches_in_part_warns_and_names_the_rest(setting: str) -> None:
    settings = {"target_modules": ["first"], setting: ["second", "query", "value"]}
    if setting == "exclude_modules":
        settings["target_modules"] = ["first", "second"]
    model = models.mlp().model
    with pytest.warns(PartialTargetWarning, match=rf"{setting}: \['query', 'value'\] match no module of Mlp") as seen:
        get_peft_model(model, LoraConfig(r=2, **settings))
    assert {warning.filename for warning in seen} == {__file__}
    assert len({str(warning.message) for warning in seen}) == 1


def test_a_list_that_matches_in_part_offers_what_is_closest() -> None:
    with pytest.warns(PartialTargetWarning, match=r"\['v_prj'\] match no module of LlamaForCausalLM. Closest: v_proj"):
        get_peft_model(models.llama().model, LoraConfig(target_modules=["q_proj", "v_prj"]))


def test_a_second_adapter_that_means_nothing_leaves_the_first_alone() -> None:
    model, inputs = models.mlp()
    get_peft_model(model, LoraConfig(r=2, target_modules=["first"]))
    before = Snapshot.of(model, inputs)
    with pytest.raises(TargetError, match="Closest: second"):
        model.add_adapter("second", LoraConfig(target_modules=["secnd"]))
    before.holds(model, inputs)
    assert list(model.peft_config) == ["default"]


# -------------------------------------------------------------------------------------------------- config errors


def test_an_unknown_setting_is_named_with_the_closest_one() -> None:
    with pytest.raises(ConfigError, match=r"^LoraConfig has no setting 'lora_alhpa'\. Did you mean 'lora_alpha'\?$"):
        LoraConfig(lora_alhpa=3)
    with pytest.raises(ConfigError, match=r"Did you mean 'target_modules'\?"):
        LoraConfig(target_module=["q"])


@pytest.mark.parametrize(
    "settings",
    [{"r": "many"}, {"target_modules": 3}, {"target_modules": [3]}, {"task_type": "CHAT"}, {"bias": 1},
     {"layers_to_transform": ["0"]}, {"rank_pattern": {"q": "x"}}, {"use_rslora": "perhaps"}],
    ids=str,
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_named(settings: dict[str, Any]) -> None:
    if settings == {"layers_to_transform": ["0"]}:
        assert LoraConfig(**settings).layers_to_transform == [0]  # pydantic reads numbers from text
        return
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError) as error:
        LoraConfig(**settings)
    assert str(error.value).startswith(f"LoraConfig: {name}={value!r}: ")


def test_assigning_a_wrong_value_later_is_caught_as_well() -> None:
    config = LoraConfig()
    with pytest.raises(ValueError, match="r"):
        config.r = 0
    assert config.r == 8


def test_settings_that_only_hf_peft_has() -> None:
    """Asking for them is an error; switching them off, as its saved files do, is not."""
    for setting in ({"use_qalora": True}, {"loftq_config": {"bits": 4}}, {"layer_replication": [(0, 1)]}):
        with pytest.raises(ConfigError, match=rf"^{next(iter(setting))} is a setting of HF PEFT's LoraConfig"):
            LoraConfig(**setting)
    assert LoraConfig(use_qalora=False, loftq_config={}, layer_replication=None, eva_config=None) == LoraConfig()


def test_every_setting_of_hf_peft_is_known() -> None:
    """Its defaults all pass, so a saved adapter_config.json of any ordinary LoRA can be read."""
    import peft

    settings = peft.LoraConfig(r=4, target_modules=["q"]).to_dict()
    for only_there in ("peft_type", "peft_version"):
        settings.pop(only_there, None)
    assert LoraConfig(**settings).r == 4
