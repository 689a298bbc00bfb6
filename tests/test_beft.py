"""BEFT against its formula, and where it goes by itself."""

import models
import pytest
import torch
from test_formulas import agrees, attached, trained

from trimtab import BeftConfig, MergeError, get_peft_model


def test_beft_shifts_the_output() -> None:
    model, inputs, own = attached(BeftConfig(target_modules=["first"]))
    assert trained(model) == 7
    expected = inputs["x"] @ model.first.weight.T + model.first.bias + own["first.shift"][0]
    agrees(model, inputs["x"], expected.detach())


@pytest.mark.parametrize(
    ("build", "target", "numbers"),
    [(models.llama, "v_proj", 2 * 8), (models.bert, "value", 2 * 16), (models.gpt2, "c_attn", 2 * 48),
     (models.t5, "v", (2 + 2 * 2) * 12)],
)  # fmt: skip
def test_beft_takes_the_values_of_attention_by_itself(build: object, target: str, numbers: int) -> None:
    model = get_peft_model(build().model, BeftConfig())
    assert model.peft_config["default"].target_modules == [target]
    assert trained(model) == numbers


def test_beft_is_not_merged_where_there_is_no_bias() -> None:
    model, _, _ = attached(BeftConfig(), models.llama())
    with pytest.raises(MergeError, match=r"self_attn.v_proj: A Linear without a bias has nothing to fold"):
        model.merge_adapter()


def test_adapters_of_beft_add_up() -> None:
    model, inputs, own = attached(BeftConfig(target_modules=["first"]))
    model.add_adapter("other", BeftConfig(target_modules=["first"], init_weights=False))
    other = model.first.adapters["other"].shift[0]
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "both")
    model.set_adapter("both")
    expected = inputs["x"] @ model.first.weight.T + model.first.bias + 0.5 * own["first.shift"][0] - 2 * other
    torch.testing.assert_close(model.first(inputs["x"]), expected)
