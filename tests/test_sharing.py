"""share_across_layers: one adapter for what is the same in every layer, trained together and saved once."""

from pathlib import Path
from typing import Any

import models
import pytest
from battery import close, run, same_bits
from models import randomise
from safetensors.torch import load_file
from torch import nn

from trimtab import BottleneckConfig, ConfigError, LoraConfig, PeftModel, get_peft_model

SHARED = LoraConfig(r=2, target_modules=["query", "value"], share_across_layers=True)


def test_parameters_and_outputs_are_those_of_equal_adapters() -> None:
    """r (in + out) for query and for value, however many layers; the oracle copies them into separate adapters."""
    model, inputs = models.bert()
    get_peft_model(model, SHARED)
    randomise(model)
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * (16 + 16)
    oracle, _ = models.bert()
    get_peft_model(oracle, SHARED.model_copy(update={"share_across_layers": None}))
    for layer, other in zip(oracle.bert.encoder.layer, model.bert.encoder.layer, strict=True):
        for name in ("query", "value"):
            own = getattr(layer.attention.self, name).adapters["default"]
            own.load_state_dict(getattr(other.attention.self, name).adapters["default"].state_dict())
    close(run(model, inputs), run(oracle, inputs))
    attention = [layer.attention.self for layer in model.bert.encoder.layer]
    assert attention[0].query.adapters["default"] is attention[1].query.adapters["default"]
    assert attention[0].query.adapters["default"] is not attention[0].value.adapters["default"]


def test_it_is_saved_once_and_shared_when_loaded(tmp_path: Path) -> None:
    model, inputs = models.bert()
    randomise(get_peft_model(model, SHARED))
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 4
    loaded = PeftModel.from_pretrained(models.bert().model, tmp_path, is_trainable=True)
    assert same_bits(run(loaded, inputs), run(model, inputs))
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_other_shapes_are_not_shared() -> None:
    """Three layers of one name but for its number: 5 -> 7, and twice 7 -> 7."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 7))
    get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1", "2"], share_across_layers=True))
    assert model.get_nb_trainable_parameters()[0] == 2 * (5 + 7) + 2 * (7 + 7)


def test_parallel_bottlenecks_share_too() -> None:
    """The adapter takes each layer's own input, though one object serves all layers."""
    one, inputs = models.opt()
    get_peft_model(one, BottleneckConfig(variant="parallel", reduction_factor=4, share_across_layers=True))
    randomise(one)
    two, _ = models.opt()
    get_peft_model(two, BottleneckConfig(variant="parallel", reduction_factor=4))
    for layer, other in zip(two.model.decoder.layers, one.model.decoder.layers, strict=True):
        layer.fc2.adapters["default"].load_state_dict(other.fc2.adapters["default"].state_dict())
    close(run(one, inputs), run(two, inputs))


@pytest.mark.parametrize("settings", [{"bias": "lora_only"}, {"use_dora": True}, {"alpha_pattern": {"query": 3}},
                                      {"init_lora_weights": "pissa"}], ids=str)  # fmt: skip
def test_what_belongs_to_one_layer_cannot_be_shared(settings: dict[str, Any]) -> None:
    (name, _), *_ = settings.items()
    with pytest.raises(ConfigError, match=f"{name}=.*cannot go with share_across_layers"):
        get_peft_model(models.bert().model, LoraConfig(target_modules=["query"], share_across_layers=True, **settings))
