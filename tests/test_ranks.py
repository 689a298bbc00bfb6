"""Ranks above the matrix are refused in new adapters, with the closest sensible one, and accepted from files."""

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from battery import Snapshot, run
from safetensors.torch import load_file, save_file

from trimtab import (
    AdaLoraConfig,
    CompacterConfig,
    ConfigError,
    DeloraConfig,
    FourierFTConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    LilyConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    MultitaskPromptTuningConfig,
    PeanutConfig,
    PeftConfig,
    PeftModel,
    PsoftConfig,
    ShiraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
    get_peft_model,
)

FIRST: dict[str, Any] = {"target_modules": ["first"]}  # a matrix (7, 5)
TOO_MUCH = r"^first has a rank of 5 at most: 6 is too much\. Closest: 5, or for these alone "
BOTH = TOO_MUCH + r"rank_pattern=\{'first': 5\} or exclude_modules=\['first'\]\.$"

CASES: list[tuple[Any, PeftConfig, str]] = [
    (models.mlp, LoraConfig(r=6, **FIRST), BOTH),
    (models.mlp, LoHaConfig(r=6, **FIRST), BOTH),
    (models.mlp, LoKrConfig(r=6, **FIRST), BOTH),
    (models.mlp, HiraConfig(r=6, **FIRST), BOTH),
    (models.mlp, HiraConfig(r=6, rank_pattern={"first": 9}, **FIRST), "of 5 at most: 9 is too much"),
    (models.mlp, GraloraConfig(r=6, gralora_k=1, **FIRST), TOO_MUCH + "exclude_modules="),
    (models.mlp, GraloraConfig(r=2, gralora_k=1, hybrid_r=6, **FIRST), TOO_MUCH + "exclude_modules="),
    (models.mlp, GraloraConfig(r=2, **FIRST), "5 inputs and 7 outputs: gralora_k=2 does not .* Closest: 1"),
    (models.mlp, GloraConfig(r=6, **FIRST), TOO_MUCH + "exclude_modules="),
    (models.mlp, GloraConfig(config_A_B="none", config_C="none", config_D_E="none", **FIRST),
     r"first: config_A_B='none' leaves nothing to train. Closest: 'constant'"),
    (models.llama, GloraConfig(config_A_B="none"), "nothing to train where there is no bias. Closest: 'constant'"),
    (models.mlp, LilyConfig(r=6, **FIRST), TOO_MUCH + "exclude_modules="),
    (models.mlp, PsoftConfig(r=6, **FIRST), TOO_MUCH + "exclude_modules="),
    (models.mlp, PeanutConfig(r=6, **FIRST), TOO_MUCH + "exclude_modules="),
    (models.mlp, AdaLoraConfig(init_r=6, target_r=2, total_step=9, **FIRST), TOO_MUCH + "exclude_modules="),
    (models.mlp, HRAConfig(r=6, **FIRST), TOO_MUCH + "exclude_modules="),
    (models.mlp, HRAConfig(r=5, **FIRST), "r must be even, not 5. Closest: 4"),
    (models.mlp, LoraConfig(r=6, rank_pattern={"first": 6}, target_modules=["first", "second"]), TOO_MUCH),
    (models.embeddings, LoraConfig(r=60, target_modules=["token"]), "^token has a rank of"),
    (models.bert, LoraConfig(target_modules="all-linear"),
     r"^classifier has a rank of 3 at most: 8 is too much\. .*exclude_modules=\['classifier'\]"),
    (models.convolutions, LoraConfig(r=7, target_modules=["plane", "line", "same"]),
     r"^same has a rank of 6 at most: 7 is too much\. Closest: 6, .*rank_pattern=\{'same': 6\}"),
    (lambda: models.convolutions(groups=2), LoraConfig(r=5, target_modules=["plane"]),
     "2 groups: its rank must be a multiple of that, not 5. Closest: 4"),
    (models.bert, CompacterConfig(reduction_factor=2, phm_rank=3), "of rank 2 at most: phm_rank=3 .* Closest: 2"),
    (models.llama, MultitaskPromptTuningConfig(num_ranks=5, num_virtual_tokens=4),
     "^LlamaForCausalLM has a rank of 4 at most: 5 is too much. Closest: 4.$"),
    (models.mlp, MissConfig(r=6, **FIRST), TOO_MUCH + "exclude_modules="),
    (models.mlp, MissConfig(r=2, init_weights="mini", mini_r=3, **FIRST),
     "^first: mini_r=3 .* does not divide 7. Closest: 1"),
    (models.gpt2, MissConfig(r=6, init_weights="bat"), "attn: r=6 .* does not divide 16. Closest: 4"),
    (models.mlp, DeloraConfig(r=6, **FIRST), BOTH),
    (models.mlp, FourierFTConfig(n_frequency=36, **FIRST), "^first has 35 places: n_frequency=36 .* Closest: 35"),
    (models.mlp, FourierFTConfig(n_frequency=3, n_frequency_pattern={"first": 0}, **FIRST), "^first .* Closest: 1,"),
    (models.mlp, ShiraConfig(r=3, **FIRST), r"^first has 35 entries, fewer than r=3 means: 3 \* 12\. Closest: 2\."),
    (models.mlp, ShiraConfig(r=1, mask_type="snip", **FIRST), "mask_type='snip': .* Closest: 'random'"),
    (models.mlp, WaveFTConfig(n_frequency=36, **FIRST), "^first has 35 places: n_frequency=36 .* Closest: 35"),
    (models.gpt2, VBLoRAConfig(), r"c_attn: vector_length=256 must divide its .*, 16 and 48\. Closest: 16\."),
    (models.gpt2, VBLoRAConfig(r=17, vector_length=8), "has a rank of 16 at most: 17 is too much"),
    (models.mlp, UniLoraConfig(r=6, theta_d_length=9, **FIRST), TOO_MUCH + "exclude_modules="),
    (models.mlp, UniLoraConfig(r=2, **FIRST), "^All A and B have 24 entries: theta_d_length=256 .* Closest: 24"),
    (models.mlp, TinyLoraConfig(r=6, **FIRST), TOO_MUCH + "exclude_modules="),
]  # fmt: skip


@pytest.mark.parametrize(("build", "config", "message"), CASES, ids=lambda value: getattr(value, "peft_type", None))
def test_a_new_adapter_s_rank_is_that_of_the_matrix_at_most(build: Any, config: PeftConfig, message: str) -> None:
    model, inputs = build()
    before = Snapshot.of(model, inputs)
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, config)
    before.holds(model, inputs)


@pytest.mark.parametrize("way", [{"rank_pattern": {"classifier": 3}}, {"exclude_modules": ["classifier"]}, {"r": 3}])
def test_what_the_message_offers_works(way: dict[str, Any]) -> None:
    get_peft_model(models.bert().model, LoraConfig(target_modules="all-linear", **way))


def test_vera_s_rank_may_exceed_the_matrix() -> None:
    """In the paper it does: what is trained are the scales of random rows, not the rows."""
    get_peft_model(models.mlp().model, VeraConfig(r=9, **FIRST))


def test_a_file_may_have_a_rank_above_the_matrix(tmp_path: Path) -> None:
    """Zeros appended to A and B, with alpha / r as before, change nothing; HF PEFT writes such ranks."""
    model, inputs = models.mlp()
    saved = get_peft_model(model, LoraConfig(r=5, lora_alpha=5, init_lora_weights=False, **FIRST))
    expected = run(model, inputs)
    saved.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    wider = {key: torch.nn.functional.pad(value, (0, 0, 0, 4) if "lora_A" in key else (0, 4))
             for key, value in weights.items()}  # fmt: skip
    save_file(wider, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    settings = {**config, "r": 9, "lora_alpha": 9}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    loaded, _ = models.mlp()
    PeftModel.from_pretrained(loaded, tmp_path)
    assert len(loaded.first.adapters["default"].A) == 9
    torch.testing.assert_close(run(loaded, inputs), expected, rtol=1e-5, atol=1e-5)
