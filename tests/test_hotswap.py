"""An adapter's weights are replaced in place: the same parameters and graphs, and the other adapter's outputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from battery import ALL_SMALL_CONFIGS, Case, Snapshot, close, far, run
from models import Tiny, randomise
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from trimtab import (
    AdapterError,
    CheckpointError,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
)


def saved(folder: Path, config: PeftConfig, tiny: Callable[[], Tiny] = models.mlp, seed: int = 2) -> Tensor:
    """Write a random adapter; what its model gives."""
    model, inputs = tiny()
    get_peft_model(model, config)
    randomise(model, seed)
    model.save_pretrained(folder)
    return run(PeftModel.from_pretrained(tiny().model, folder), inputs)


@pytest.mark.parametrize("case", ALL_SMALL_CONFIGS, ids=lambda case: case.id)
def test_every_method_swaps(case: Case, tmp_path: Path) -> None:
    expected = saved(tmp_path, case.config, case.tiny)
    model, inputs = case.tiny()
    get_peft_model(model, case.config)
    randomise(model)
    assert (run(model, inputs) - expected).abs().max() > 1e-4
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    model.hotswap_adapter(tmp_path)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters


@pytest.mark.parametrize(
    "settings",
    [{"r": 1}, {"lora_alpha": 1}, {"r": 2, "lora_alpha": 7, "use_rslora": True}, {"rank_pattern": {"first": 1}}],
    ids=str,
)
@pytest.mark.parametrize("shared", [{}, {"use_dora": True}, {"bias": "all", "modules_to_save": ["head"]}], ids=str)
def test_loras_of_other_ranks_and_scales(settings: dict[str, Any], shared: dict[str, Any], tmp_path: Path) -> None:
    common: dict[str, Any] = {"target_modules": ["first", "second"], **shared}
    expected = saved(tmp_path / "in", LoraConfig(**{"r": 3, "lora_alpha": 5, **common, **settings}))
    model, inputs = models.mlp()
    get_peft_model(model, LoraConfig(r=3, lora_alpha=5, **common))
    randomise(model)
    model.hotswap_adapter(tmp_path / "in")
    close(run(model, inputs), expected)
    model.save_pretrained(tmp_path / "out")
    assert model.peft_config["default"].r == 3
    close(run(PeftModel.from_pretrained(models.mlp().model, tmp_path / "out"), inputs), expected)


def test_nothing_is_compiled_anew(tmp_path: Path) -> None:
    targets = {"target_modules": ["q_proj", "down_proj"]}
    others = [saved(tmp_path / str(r), LoraConfig(r=r, lora_alpha=3, **targets), models.llama, r) for r in (1, 2, 4)]
    torch._dynamo.reset()
    model, inputs = models.llama()
    get_peft_model(model, LoraConfig(r=4, lora_alpha=5, **targets))
    counter = CompileCounterWithBackend("aot_eager")
    made = torch.compile(model, fullgraph=True, backend=counter)
    before = run(made, inputs)
    graphs = counter.frame_count
    for r, expected in zip((1, 2, 4), others, strict=True):
        model.hotswap_adapter(tmp_path / str(r))
        close(run(made, inputs), expected)
        far(expected, before)
    assert counter.frame_count == graphs
    torch._dynamo.reset()


LORA = LoraConfig(r=2, lora_alpha=5, target_modules=["first", "second"])
REFUSED: dict[str, tuple[PeftConfig, PeftConfig, str]] = {
    "rank": (LORA, LORA.model_copy(update={"r": 3}), r"At first its rank is 3 and its scale 1.66667, here 2 and 2.5\."),
    "modules": (LORA, LoraConfig(r=2, target_modules=["first"]),
                r"At second one of the two only is there\. Nothing was changed"),
    "method": (LORA, LoHaConfig(r=2, target_modules=["first", "second"]), "differs in kind: LoraAdapter, LoHaAdapter"),
    "dora": (LORA, LORA.model_copy(update={"use_dora": True}), r"differs in magnitude.value: None, \(7,\)"),
    "side": (IA3Config(target_modules=["first"]),
             IA3Config(target_modules=["first"], feedforward_modules=["first"]),
             r"differs in scale: \(7, 1\), \(1, 5\)"),
    "alpha": (LoHaConfig(r=2, target_modules=["first"]), LoHaConfig(r=2, alpha=5, target_modules=["first"]),
              "At first it differs in scale: 4.0, 2.5"),
    "tokens": (TrainableTokensConfig(token_indices=[2], target_modules=["head"]),
               TrainableTokensConfig(token_indices=[1], target_modules=["head"]), r"tokens.ids: \[2\], \[1\]"),
}  # fmt: skip


@pytest.mark.parametrize(("here", "there", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_not_act_as_it_did(here: PeftConfig, there: PeftConfig, message: str, tmp_path: Path) -> None:
    saved(tmp_path, there)
    model, inputs = models.mlp()
    get_peft_model(model, here)
    before = Snapshot.of(model, inputs)
    with pytest.raises(CheckpointError, match=message):
        model.hotswap_adapter(tmp_path)
    before.holds(model, inputs)


def test_names_and_merged_adapters(tmp_path: Path) -> None:
    saved(tmp_path, LORA)
    model, inputs = models.mlp()
    get_peft_model(model, LORA)
    with pytest.raises(AdapterError, match="There is no adapter 'defualt'"):
        model.hotswap_adapter(tmp_path, "defualt")
    model.merge_adapter()
    before = run(model, inputs)
    with pytest.raises(AdapterError, match="merged"):
        model.hotswap_adapter(tmp_path)
    assert torch.equal(run(model, inputs), before)
