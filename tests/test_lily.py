"""Lily against its formula, who shares what with whom, and HF PEFT's adapters on a batch of one row."""

from pathlib import Path
from typing import Any

import models
import peft
import pytest
import test_interop_methods as interop
import torch
from safetensors.torch import load_file
from test_formulas import attached, trained
from test_interop_methods import Tiny, pair, rows, run

import trimtab
from trimtab import CheckpointError, ConfigError, LilyConfig


def test_lily_mixes_experts_by_the_mean_over_a_row() -> None:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(5, 7))
    model, _, own = attached(LilyConfig(r=2, num_B=3, scaling=0.5, target_modules=["0"]), models.Tiny(base, {}))
    A, B, R = own["0.A.weight"], own["0.B.weight"], own["0.router.weight"]
    x = torch.randn(4, 6, 5)
    expected = []
    for row in x:
        shares = torch.stack([torch.softmax(R @ A @ token, 0) for token in row]).mean(0)
        mixed = sum(share * B[2 * e : 2 * e + 2] for e, share in enumerate(shares))
        expected.append(row @ (base[0].weight.T + 0.5 * A.T @ mixed))
    torch.testing.assert_close(model(x), torch.stack(expected) + base[0].bias, rtol=1e-5, atol=1e-5)
    assert trained(model) == 2 * 5 + 3 * 2 * 7 + 3 * 2


def test_lily_shares_a_by_strides_and_b_by_kinds(tmp_path: Path) -> None:
    """Of four layers, three share A, and q and v, though of one shape, share nothing."""
    config = LilyConfig(r=3, stride_A=3, num_B=2, target_modules=["q_proj", "v_proj"])
    build = {"num_hidden_layers": 4, "num_key_value_heads": 4}
    model, inputs, _ = attached(config, models.llama(**build))
    assert trained(model) == 2 * (2 * 3 * 16 + 2 * 3 * 16 + 4 * 2 * 3)
    at = [[layer.self_attn.q_proj.adapters["default"] for layer in model.model.layers],
          [layer.self_attn.v_proj.adapters["default"] for layer in model.model.layers]]  # fmt: skip
    for kind in at:
        assert [kind.index(next(other for other in kind if other.A is own.A)) for own in kind] == [0, 0, 0, 3]
        assert all(own.B is kind[0].B for own in kind)
        assert len({id(own.router) for own in kind}) == 4
    assert at[0][0].A is not at[1][0].A
    assert at[0][0].B is not at[1][0].B
    expected = models.output(model, inputs)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 4 * 2 * 3  # as HF PEFT's: each layer has all of its own
    loaded = trimtab.PeftModel.from_pretrained(models.llama(**build).model, tmp_path, is_trainable=True)
    torch.testing.assert_close(models.output(loaded, inputs), expected, rtol=0, atol=0)
    assert trained(loaded) == trained(model)


def test_lily_by_a_regular_expression_shares_all_of_one_shape() -> None:
    model, _, _ = attached(LilyConfig(r=3, target_modules=r".*\.(q_proj|o_proj|v_proj)"), models.llama())
    attention = model.model.layers[1].self_attn
    q, o, v = (getattr(attention, name).adapters["default"] for name in ("q_proj", "o_proj", "v_proj"))
    assert q.B is o.B
    assert q.B is not v.B  # (8, 16)


def test_lily_refuses_what_leaves_nothing_to_route() -> None:
    with pytest.raises(ConfigError, match="num_B=1: Input should be greater than or equal to 2"):
        LilyConfig(num_B=1)
    with pytest.raises(ConfigError, match="stride_A=0: Input should be greater than or equal to 1"):
        LilyConfig(stride_A=0)


def test_a_lily_that_shares_otherwise_does_not_take_the_place_of_one(tmp_path: Path) -> None:
    attached(LilyConfig(r=3), models.llama())[0].save_pretrained(tmp_path)
    model, _, _ = attached(LilyConfig(r=3, stride_A=2), models.llama())
    with pytest.raises(CheckpointError, match="it differs in shares"):
        model.hotswap_adapter(tmp_path, "default")


CASES = [
    *rows("Lily", ("llama", "bert", "t5", "vit"), r=3),
    *rows("Lily", ["llama"], r=4, stride_A=2, num_B=3, scaling=0.5, target_modules=["q_proj", "o_proj"]),
    *rows("Lily", ["bert"], r=2, init_weights=False, target_modules=r".*\.(query|key)"),
]


def single(row: interop.Row) -> tuple[Tiny, torch.nn.Module]:
    """A model with one row as input: of more, HF PEFT takes one mean."""
    tiny, base = pair(row)
    return Tiny(tiny.model, {key: value[:1] for key, value in tiny.inputs.items()}), base


@pytest.mark.parametrize("row", CASES, ids=interop.name_of)
@pytest.mark.filterwarnings("ignore")
def test_hf_peft_s_lily_acts_the_same_here(row: interop.Row, tmp_path: Path) -> None:
    tiny, base = single(row)
    plain = run(base, tiny)
    theirs: Any = peft.get_peft_model(tiny.model, peft.LilyConfig(**row[2]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    theirs.eval().save_pretrained(tmp_path)
    expected = run(theirs, tiny)
    interop.close(run(trimtab.PeftModel.from_pretrained(base, tmp_path).eval(), tiny), expected)
    assert (expected - plain).abs().max() > 1e-3


@pytest.mark.parametrize("row", CASES, ids=interop.name_of)
@pytest.mark.filterwarnings("ignore")
def test_our_lily_acts_the_same_there(row: interop.Row, tmp_path: Path) -> None:
    tiny, base = single(row)
    plain = run(base, tiny)
    ours = trimtab.get_peft_model(tiny.model, LilyConfig(**row[2])).eval()
    models.randomise(ours)
    expected = run(ours, tiny)
    ours.save_pretrained(tmp_path)
    interop.close(run(peft.PeftModel.from_pretrained(base, tmp_path).eval(), tiny), expected)
    assert (expected - plain).abs().max() > 1e-3
