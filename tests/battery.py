"""The contract battery: what every method promises, as functions that take a case.

A new method adds one `Case` to ALL_SMALL_CONFIGS and gets every check. What it cannot promise it declares there, with
the reason: `skips={"merge": "the bottleneck is not linear"}` skips every check with "merge" in its name. A case that
skips "merge" must refuse to merge instead, and leave the model as it was.
"""

import copy
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import models
import pytest
import torch
from models import Tiny, output, randomise
from torch import Tensor, nn

import trimtab
from trimtab import (
    AdaLoraConfig,
    AdapterError,
    AdaptionPromptConfig,
    BeftConfig,
    BitFitConfig,
    BOFTConfig,
    BottleneckConfig,
    C3AConfig,
    CompacterConfig,
    CPTConfig,
    DeloraConfig,
    FourierFTConfig,
    FullConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LoReftConfig,
    MamConfig,
    MergeError,
    MissConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    PeanutConfig,
    PeftConfig,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PsoftConfig,
    PveraConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    UnionConfig,
    UniPeltConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
    get_peft_model,
    sites,
    swap,
)


@dataclass(frozen=True)
class Case:
    """A small config, and the tiny model it is for."""

    id: str
    config: PeftConfig
    tiny: Callable[[], Tiny] = models.mlp
    skips: dict[str, str] = field(default_factory=dict)  # part of a check's name -> why it does not hold

    def skipped(self, check: str) -> str | None:
        return next((reason for part, reason in self.skips.items() if part in check), None)


def lora(id: str, tiny: Callable[[], Tiny] = models.mlp, skips: dict[str, str] | None = None, **settings: Any) -> Case:
    """LoRA of a scale other than 1; on two stacked layers of the MLP unless the case says otherwise."""
    defaults = {"r": 2, "lora_alpha": 5, "target_modules": ["first", "second"]}
    return Case(id, LoraConfig(**{**defaults, **settings}), tiny, skips or {})


REPLACES = {"nest": "two trained copies of one module cannot act together; they are refused"}
BENT = {"merge": "a non-linearity lies between the two matrices, so no weight does the same"}
COARSE = {"finite_differences": "Llama's norm computes in float32 whatever its input, too coarse for a difference"}
DETACHED = {"finite_differences": "the paper's gradient takes the norm of the rows as a constant (section 4.3)"}
_PAIRS = "two equal reflections undo each other up to rounding, not in every bit"
_SPECTRUM = "as in the paper the numbers start from a normal distribution"
SPECTRUM = {"identity": _SPECTRUM, "switch": _SPECTRUM, "trains_in_float32": _SPECTRUM}
_NEAR = "the numbers start near zero, not at it"
NEAR = {"identity": _NEAR, "switch": _NEAR, "trains_in_float32": _NEAR}
PAIRS = {"identity": _PAIRS, "switch": _PAIRS, "trains_in_float32": _PAIRS}
_RANDOM = "this start is random, not one that changes nothing"
RANDOM = {"identity": _RANDOM, "switch": _RANDOM, "trains_in_float32": _RANDOM}
GATED = {"merge": "the gate depends on the input"}
ROUTED = {"merge": "the router looks at the input"}
PREFIXED = {
    "identity": "a prefix changes what attention sees, whatever it holds",
    "merge": "no weight stands for a prefix",
    "nest": "one set of virtual tokens acts at a time; a second is refused",
}
TOKENS = models.ids().unique().tolist()[::-1]


def virtual(id: str, config: type[PeftConfig], tiny: Callable[[], Tiny] = models.gpt2, **settings: Any) -> Case:
    """Virtual tokens before the input of a causal language model, unless the case says otherwise."""
    skips = {
        "identity": "tokens before the input change what attention sees, whatever they hold",
        "merge": "no weight stands for tokens before the input",
        "nest": "one set of virtual tokens acts at a time; a second is refused",
    }
    if tiny is models.t5:
        skips["finite_differences"] = "T5's norm computes in float32 whatever its input, too coarse for a difference"
    return Case(id, config(**{"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", **settings}), tiny, skips)  # type: ignore[arg-type]


ALL_SMALL_CONFIGS = [
    lora("lora"),
    lora("lora-rslora", use_rslora=True),
    lora("lora-bias-all", bias="all"),
    lora("lora-bias-lora_only", bias="lora_only"),
    lora("lora-dropout", lora_dropout=0.5),
    lora("lora-gaussian", init_lora_weights="gaussian"),
    lora(
        "lora-modules_to_save",
        modules_to_save=["norm", "head"],
        skips={"nest": "two trained copies of one module cannot act together; they are refused"},
    ),
    lora("lora-patterns", models.llama, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3},
         alpha_pattern={"layers.0.self_attn.q_proj": 1},
         skips={"finite_differences": "Llama's norm computes in float32, whatever its input: too coarse"}),
    lora("lora-shared", models.bert, target_modules=["query", "dense"], share_across_layers=True),
    lora("lora-gpt2", models.gpt2, target_modules=["c_attn", "c_proj", "c_fc"], bias="all"),
    lora("lora-bert", models.bert, target_modules="all-linear", task_type="SEQ_CLS",
         skips={"nest": "two trained copies of one head cannot act together; they are refused"}),
    lora("lora-vit", models.vit, target_modules=["q_proj", "projection"]),
    lora("lora-mixtral", models.mixtral, target_modules=["q_proj"], rank_pattern={"down_proj": 3},
         target_parameters=["experts.gate_up_proj", "experts.down_proj", "gate.weight"], skips=COARSE),
    lora("lora-experts", models.experts, target_modules=["1"], target_parameters=["up", "down", "mixed"]),
    lora("lora-experts-transposed", partial(models.experts, True), target_modules=["inner"], bias="all",
         target_parameters=["up"]),
    lora("lora-embeddings", models.embeddings, target_modules=["token", "position", "inner"]),
    lora("lora-convolutions", models.convolutions, target_modules=["volume", "plane", "line", "same"]),
    lora("lora-groups", lambda: models.convolutions(groups=2), target_modules=["plane", "line"],
         skips={"merge": "A sees all channels, a grouped convolution its own share, so no such weight exists"}),
    lora("lora-encoder", models.encoder, target_modules="all-linear", bias="all"),
    lora("lora-attention", models.encoder, target_modules=["self_attn", "out_proj"]),
    Case("adalora", AdaLoraConfig(init_r=3, target_r=2, tinit=2, total_step=10, lora_alpha=5, orth_reg_weight=0,
                                  target_modules=["first", "second"])),
    Case("adalora-vit", AdaLoraConfig(init_r=3, target_r=2, tinit=2, total_step=10, lora_dropout=0.2, orth_reg_weight=0,
                                      target_modules=["q_proj", "projection"]), models.vit),
    Case("adalora-gpt2", AdaLoraConfig(init_r=3, target_r=2, tinit=2, total_step=10, lora_alpha=30, orth_reg_weight=0,
                                       target_modules=["c_attn", "c_fc"]), models.gpt2),
    Case("adalora-encoder", AdaLoraConfig(init_r=3, target_r=2, tinit=2, total_step=10, orth_reg_weight=0,
                                          target_modules=["self_attn", "linear1"]), models.encoder),
    Case("bottleneck", BottleneckConfig(target_modules=["first", "norm"], reduction_factor=2, non_linearity="tanh"),
         skips=BENT),
    Case("bottleneck-houlsby", BottleneckConfig(variant="houlsby", reduction_factor=4, non_linearity="silu",
                                                layer_norm="before", drop_first=1, dropout=0.3), models.opt, BENT),
    Case("bottleneck-pfeiffer", BottleneckConfig(reduction_factor=2, non_linearity="gelu", layer_norm="after"),
         models.gpt2, BENT),
    Case("bottleneck-shared", BottleneckConfig(variant="houlsby", reduction_factor=4, non_linearity="tanh",
                                               share_across_layers=True), models.vit, BENT),
    Case("bottleneck-parallel", BottleneckConfig(variant="parallel", reduction_factor=8, non_linearity="tanh"),
         models.bert, BENT | {"nest": "the adapter at the part's end takes the input that the one at its start keeps"}),
    Case("bottleneck-modules", BottleneckConfig(target_modules=["self_attn", "mlp"], non_linearity="tanh"),
         models.llama, BENT | COARSE),
    Case("compacter", CompacterConfig(phm_dim=2, phm_rank=2, reduction_factor=1, target_modules=["second", "norm"]),
         skips=BENT),
    Case("compacter-t5", CompacterConfig(reduction_factor=2, plus_plus=True), models.t5, BENT | COARSE),
    Case("loreft", LoReftConfig(r=2, first=2, last=1, tied=False, layers=[0]), models.bert,
         {"merge": "it acts at some positions only, so no weight does the same"}),
    Case("loreft-gpt2", LoReftConfig(r=3, first=0, last=2), models.gpt2,
         {"merge": "it acts at some positions only, so no weight does the same"}),
    Case("ia3", IA3Config(target_modules=["first", "second"], feedforward_modules=["second"])),
    Case("ia3-llama", IA3Config(), models.llama, COARSE),
    Case("ia3-gpt2", IA3Config(), partial(models.gpt2, initializer_range=0.2)),
    Case("ia3-encoder", IA3Config(target_modules=["self_attn", "out_proj", "linear1", "linear2"],
                                  feedforward_modules=["linear2"]), models.encoder),
    Case("ia3-groups", IA3Config(target_modules=["volume", "plane", "line"], feedforward_modules=["plane"]),
         lambda: models.convolutions(groups=2)),
    Case("ia3-embeddings", IA3Config(target_modules=["token", "inner"], feedforward_modules=["inner"]),
         models.embeddings),
    Case("full", FullConfig(), skips=REPLACES),
    Case("full-gpt2", FullConfig(), partial(models.gpt2, initializer_range=0.2),
         REPLACES | {"trains_in_float32": "the copies compute in float32, whose rounding is another"}),
    Case("ln_tuning", LNTuningConfig(), skips=REPLACES),
    Case("ln_tuning-llama", LNTuningConfig(), models.llama, REPLACES | COARSE),
    Case("ln_tuning-encoder", LNTuningConfig(), models.encoder, REPLACES),
    Case("bitfit", BitFitConfig()),
    Case("bitfit-bert", BitFitConfig(target_modules="attention"), partial(models.bert, initializer_range=0.2),
         {"finite_differences": "the same shift of all keys shifts all scores of a query alike, which softmax drops"}),
    Case("bitfit-encoder", BitFitConfig(), models.encoder),
    Case("bitfit-convolutions", BitFitConfig(), models.convolutions),
    lora("dora", use_dora=True, skips=DETACHED),
    lora("dora-bias-dropout", use_dora=True, bias="all", lora_dropout=0.5, skips=DETACHED),
    lora("dora-gpt2", partial(models.gpt2, initializer_range=0.2), use_dora=True, target_modules=["c_attn", "c_proj"],
         skips=DETACHED),
    lora("dora-encoder", models.encoder, use_dora=True, target_modules="all-linear", skips=DETACHED),
    lora("dora-convolutions", models.convolutions, use_dora=True, target_modules=["volume", "plane", "line", "same"],
         skips=DETACHED),
    lora("dora-embeddings", models.embeddings, use_dora=True, target_modules=["token", "inner"], skips=DETACHED),
    Case("vera", VeraConfig(r=6, target_modules=["first", "second"], bias="vera_only")),
    Case("vera-seed", VeraConfig(r=6, target_modules=["first", "second"], save_projection=False, vera_dropout=0.5)),
    Case("pvera", PveraConfig(r=6, target_modules=["first", "second"], bias="pvera_only")),
    Case("pvera-gpt2", PveraConfig(r=5, save_projection=False, pvera_dropout=0.3, bias="all"), models.gpt2),
    Case("beft", BeftConfig(target_modules=["first", "second"])),
    Case("beft-llama", BeftConfig(), models.llama, COARSE | {"merge": "the layer has no bias to fold it into"}),
    Case("beft-gpt2", BeftConfig(target_modules=["c_attn", "c_fc"]), models.gpt2),
    Case("lily", LilyConfig(r=3, num_B=3, scaling=2.0, target_modules=["first", "second"]), skips=ROUTED),
    Case("lily-bert", LilyConfig(r=4, stride_A=2, target_modules=["query", "value", "intermediate.dense"]),
         models.bert, ROUTED),
    Case("psoft", PsoftConfig(r=3, target_modules=["first", "second"])),
    Case("psoft-gpt2", PsoftConfig(r=4, use_cayley_neumann=True, cayley_neumann_eps=0.5, ab_svd_init="pissa_init",
                                   psoft_dropout=0.1, psoft_mag_a=False), models.gpt2),
    Case("psoft-free", PsoftConfig(r=4, psoft_orth=False, psoft_svd="lowrank", psoft_mag_a=False, psoft_mag_b=False),
         models.bert),
    Case("peanut", PeanutConfig(r=3, scaling=2.0, act_fn="tanh", target_modules=["first", "second"])),
    Case("peanut-gpt2", PeanutConfig(r=4, depth=2), models.gpt2),
    Case("peanut-bert", PeanutConfig(r=4, depth=1, act_fn="mish"), models.bert),
    Case("loha", LoHaConfig(r=2, alpha=3, target_modules=["first", "second"])),
    Case("loha-gpt2", LoHaConfig(r=4, alpha=16), partial(models.gpt2, initializer_range=0.2)),
    Case("loha-dropout", LoHaConfig(r=2, target_modules=["first", "second"], rank_dropout=0.3, module_dropout=0.01)),
    Case("loha-convolutions", LoHaConfig(r=4, target_modules=["volume", "plane", "line", "same"],
                                         use_effective_conv2d=True), partial(models.convolutions, groups=2)),
    Case("loha-embeddings", LoHaConfig(r=4, target_modules=["token", "inner"]), models.embeddings),
    Case("lokr", LoKrConfig(r=2, alpha=3, target_modules=["first", "second"])),
    Case("lokr-low-rank", LoKrConfig(r=1, target_modules=["first", "second"], decompose_both=True, decompose_factor=3)),
    Case("lokr-convolutions", LoKrConfig(r=1, target_modules=["volume", "plane", "line", "same"],
                                         use_effective_conv2d=True), partial(models.convolutions, groups=2)),
    Case("miss", MissConfig(r=2, target_modules=["first", "second"], bias="MiSS_only")),
    Case("miss-gpt2", MissConfig(r=5, miss_dropout=0.3), partial(models.gpt2, initializer_range=0.2)),
    Case("miss-mini", MissConfig(r=2, init_weights="mini", mini_r=3, target_modules=["second"], bias="all")),
    Case("miss-bat", MissConfig(r=4, init_weights="bat", miss_dropout=0.3, bias="MiSS_only"),
         partial(models.gpt2, initializer_range=0.2)),
    Case("delora", DeloraConfig(r=2, delora_lambda=3, target_modules=["first", "second"], bias="delora_only")),
    Case("delora-gpt2", DeloraConfig(r=4, module_dropout=0.3, lambda_pattern={"h.0.attn.c_attn": 5}),
         partial(models.gpt2, initializer_range=0.2)),
    Case("fourierft", FourierFTConfig(n_frequency=20, scaling=30, init_weights=True, bias="fourier_only",
                                      target_modules=["first", "second"])),
    Case("fourierft-random-gpt2", FourierFTConfig(n_frequency=90, scaling=90,
                                                  n_frequency_pattern={"h.0.attn.c_attn": 70}),
         partial(models.gpt2, initializer_range=0.2), SPECTRUM),
    Case("fourierft-convolutions", FourierFTConfig(n_frequency=50, init_weights=True,
                                                   target_modules=["volume", "plane", "line", "same"]),
         partial(models.convolutions, groups=2)),
    Case("fourierft-embeddings", FourierFTConfig(n_frequency=30, init_weights=True, target_modules=["token", "inner"]),
         models.embeddings),
    Case("fourierft-encoder", FourierFTConfig(n_frequency=50, scaling=40, init_weights=True,
                                              target_modules=["self_attn", "linear1"]), models.encoder),
    Case("randlora", RandLoraConfig(r=3, randlora_alpha=30, target_modules=["first", "second"], bias="randlora_only")),
    Case("randlora-sparse-gpt2", RandLoraConfig(r=4, randlora_alpha=20, sparse=True, save_projection=False,
                                                randlora_dropout=0.3, target_modules=["c_attn", "c_proj"]),
         partial(models.gpt2, initializer_range=0.2)),
    Case("oft", OFTConfig(oft_block_size=0, r=1, target_modules=["first", "second"], bias="oft_only")),
    Case("oft-cayley-gpt2", OFTConfig(oft_block_size=4, use_cayley_neumann=False, block_share=True),
         partial(models.gpt2, initializer_range=0.2)),
    Case("oft-dropout", OFTConfig(oft_block_size=4, module_dropout=0.1), partial(models.gpt2, initializer_range=0.2)),
    Case("oft-encoder", OFTConfig(oft_block_size=4, target_modules=["self_attn", "linear1"]), models.encoder),
    Case("oft-convolutions", OFTConfig(oft_block_size=4, target_modules=["volume", "plane", "line"]),
         partial(models.convolutions, groups=2)),
    Case("oft-embeddings", OFTConfig(oft_block_size=3, target_modules=["token"]), models.embeddings),
    Case("boft", BOFTConfig(boft_block_size=0, boft_block_num=1, target_modules=["first", "second"], bias="all")),
    Case("boft-butterfly", BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2),
         partial(models.gpt2, initializer_range=0.2)),
    Case("boft-convolutions", BOFTConfig(boft_block_size=6, target_modules=["volume", "plane", "line"]),
         models.convolutions),
    Case("c3a", C3AConfig(block_size=4, block_size_pattern={"value": 8}, bias="c3a_only", init_weights=True),
         models.bert),
    Case("c3a-gpt2", C3AConfig(block_size=8, bias="all", init_weights=True), models.gpt2),
    Case("c3a-xavier", C3AConfig(block_size=1, target_modules=["first", "second"]), skips=RANDOM),
    Case("road", RoadConfig(group_size=6, target_modules=["second"])),
    Case("road-gpt2", RoadConfig(variant="road_2", group_size=8), models.gpt2),
    Case("road-bert", RoadConfig(variant="road_4", group_size=4), models.bert),
    Case("road-embeddings", RoadConfig(group_size=2, target_modules=["token"]), models.embeddings),
    Case("hira", HiraConfig(r=2, target_modules=["first", "second"])),
    Case("hira-gpt2", HiraConfig(r=3, init_weights="gaussian", rank_pattern={"c_proj": 2},
                                 target_modules=["c_attn", "c_proj"]), models.gpt2),
    Case("hira-dropout", HiraConfig(r=2, hira_dropout=0.3, target_modules=["first", "second"])),
    Case("hira-convolutions", HiraConfig(r=6, rank_pattern={"head": 3}, init_weights=False,
                                         target_modules=["volume", "plane", "line", "same", "head"]),
         partial(models.convolutions, groups=2), RANDOM),
    Case("hira-embeddings", HiraConfig(r=4, target_modules=["token", "inner"]), models.embeddings),
    Case("gralora", GraloraConfig(r=4, alpha=8, bias="gralora_only"), models.bert),
    Case("gralora-gpt2", GraloraConfig(r=4, gralora_k=4, hybrid_r=2, alpha=9, target_modules=["c_attn", "c_proj"]),
         models.gpt2),
    Case("gralora-dropout", GraloraConfig(r=2, gralora_k=1, gralora_dropout=0.3, target_modules=["first", "second"])),
    Case("glora", GloraConfig(r=2, target_modules=["first", "second"])),
    Case("glora-vectors", GloraConfig(config_A_B="vector", config_C="vector", config_D_E="vector", bias="glora_only",
                                      target_modules=["first", "second"])),
    Case("glora-gpt2", GloraConfig(r=2, config_A_B="constant", config_C="none", bias="all"), models.gpt2),
    Case("glora-llama", GloraConfig(r=2), models.llama, COARSE),
    Case("glora-bias", GloraConfig(r=3, config_A_B="none"), models.bert),
    Case("hra", HRAConfig(r=2, target_modules=["first", "second"], bias="hra_only"), skips=PAIRS),
    Case("hra-orthogonal", HRAConfig(r=2, apply_GS=True, target_modules=["first", "second"]),
         skips={"identity": "W (I - 2 U U^T) is no identity for any U", "switch": "the second starts as no identity",
                "trains_in_float32": "it is no identity at first"}),
    Case("hra-convolutions", HRAConfig(r=4, target_modules=["volume", "plane", "line"]), models.convolutions, PAIRS),
    Case("shira", ShiraConfig(r=2, target_modules=["first", "second"])),
    Case("shira-seed-gpt2", ShiraConfig(r=3, random_seed=4), partial(models.gpt2, initializer_range=0.2)),
    Case("shira-convolutions", ShiraConfig(r=2, target_modules=["volume", "plane", "line", "same"]),
         partial(models.convolutions, groups=2)),
    Case("shira-embeddings", ShiraConfig(r=3, target_modules=["token", "inner"]), models.embeddings),
    Case("shira-encoder", ShiraConfig(r=3, target_modules=["self_attn", "linear1"]), models.encoder),
    Case("waveft", WaveFTConfig(n_frequency=20, target_modules=["first", "second"], bias="waveft_only")),
    Case("waveft-db3-gpt2", WaveFTConfig(n_frequency=90, scaling=3, wavelet_family="db3"),
         partial(models.gpt2, initializer_range=0.2)),
    Case("waveft-plain", WaveFTConfig(n_frequency=20, use_idwt=False, proportional_parameters=True,
                                      target_modules=["first", "second"])),
    Case("waveft-convolutions", WaveFTConfig(n_frequency=50, target_modules=["volume", "plane", "line", "same"]),
         partial(models.convolutions, groups=2)),
    Case("waveft-encoder", WaveFTConfig(n_frequency=50, scaling=4, target_modules=["self_attn", "linear1"]),
         models.encoder),
    Case("unilora", UniLoraConfig(r=2, theta_d_length=30, target_modules=["first", "second"], bias="unilora_only"),
         skips=NEAR),
    Case("unilora-gpt2", UniLoraConfig(r=2, theta_d_length=50, unilora_dropout=0.3,
                                       target_modules=["c_attn", "c_proj"]),
         partial(models.gpt2, initializer_range=0.2), NEAR),
    Case("vblora", VBLoRAConfig(r=2, num_vectors=9, vector_length=8, topk=3, bias="vblora_only"),
         partial(models.gpt2, initializer_range=0.2), NEAR),
    Case("vblora-dropout", VBLoRAConfig(r=2, num_vectors=9, vector_length=4, topk=2, vblora_dropout=0.3,
                                        target_modules=["query", "output.dense"]),
         partial(models.bert, initializer_range=0.2), NEAR),
    Case("tinylora", TinyLoraConfig(r=2, u=5, target_modules=["first", "second"], bias="tinylora_only")),
    Case("tinylora-gpt2", TinyLoraConfig(r=3, u=4, weight_tying=0.6, tinylora_dropout=0.3, save_projection=False,
                                         target_modules=["c_attn", "c_proj"]),
         partial(models.gpt2, initializer_range=0.2)),
    Case("tinylora-embeddings", TinyLoraConfig(u=6, target_modules=["token", "inner"]), models.embeddings),
    Case("trainable_tokens", TrainableTokensConfig(token_indices=TOKENS), models.llama, COARSE),
    Case("trainable_tokens-tied", TrainableTokensConfig(token_indices=TOKENS),
         partial(models.gpt2, initializer_range=0.2)),
    Case("trainable_tokens-linear", TrainableTokensConfig(token_indices=[2, 0], target_modules=["head"])),
    lora("lora-tokens", partial(models.gpt2, initializer_range=0.2), target_modules=["c_attn"],
         trainable_token_indices=TOKENS),
    lora("lora-alora", models.gpt2, target_modules=["c_attn", "c_fc"],
         skips={"merge": "it acts on some tokens only", "nest": "layers act in calls of the model only; tested apart"},
         alora_invocation_tokens=models.ids()[0, 2:3].tolist()),
    lora("lora-pissa", init_lora_weights="pissa", lora_dropout=0.1, skips={"identity": "dropout hides parts of W"}),
    lora("lora-olora-dora", init_lora_weights="olora", use_dora=True, skips=DETACHED | {
        "identity": "the rows' length is that of W - B0 A0 + B A, W's up to rounding",
        "switch": "W's up to rounding, as said",
        "trains_in_float32": "W's up to rounding, as said"}),
    lora("lora-orthogonal", init_lora_weights="orthogonal", skips={
        "identity": "B A is zero up to rounding", "switch": "zero up to rounding, as said",
        "trains_in_float32": "zero up to rounding, as said"}),
    Case("lokr-lycoris", LoKrConfig(r=2, target_modules=["token", "inner"], init_weights="lycoris"), models.embeddings),
    Case("llama_adapter", AdaptionPromptConfig(adapter_len=3, adapter_layers=1), models.gpt2,
         skips={"merge": "a second attention is no weight", "nest": "they do not act around the call: tested apart"}),
    Case("llama_adapter-llama", AdaptionPromptConfig(adapter_len=3), models.llama,
         skips={"merge": "a second attention is no weight", "nest": "they do not act around the call: tested apart",
                "finite_differences": "Llama's norm computes in float32 whatever its input, too coarse for it"}),
    Case("union", UnionConfig(methods=[  # two at "first", in this order, and two at "second"
        LoraConfig(r=2, lora_alpha=5, target_modules=["first", "second"], bias="all"),
        IA3Config(target_modules=["first"], feedforward_modules=["first"]),
        HRAConfig(r=2, target_modules=["second"])]), skips=PAIRS),
    Case("union-saved", UnionConfig(modules_to_save=["head"], methods=[
        LoraConfig(r=2, target_modules=["first"]), BitFitConfig()]), skips=REPLACES),
    Case("union-gated", UnionConfig(gated=True, methods=[
        LoraConfig(r=2, lora_alpha=5, target_modules=["first", "second"]),
        BottleneckConfig(target_modules=["second"], reduction_factor=4)]), skips=GATED),
    Case("mam", MamConfig(num_virtual_tokens=3, encoder_hidden_size=7), models.opt, skips=PREFIXED),
    Case("unipelt", UniPeltConfig(num_virtual_tokens=3, r=2, reduction_factor=4), models.gpt2, skips=PREFIXED),
    Case("poly", PolyConfig(r=2, n_skills=3, target_modules=["first", "second"])),
    virtual("prompt_tuning", PromptTuningConfig),
    virtual("prompt_tuning-sampled", PromptTuningConfig, prompt_tuning_init="SAMPLE_VOCAB"),
    virtual("prompt_tuning-bert", PromptTuningConfig, models.bert, task_type="SEQ_CLS"),
    virtual("prompt_tuning-t5", PromptTuningConfig, models.t5, task_type="SEQ_2_SEQ_LM"),
    virtual("multitask_prompt_tuning", MultitaskPromptTuningConfig, num_ranks=2),
    virtual("cpt", CPTConfig, cpt_token_ids=[9, 7, 8], cpt_tokens_type_mask=[1, 2, 3], opt_projection_epsilon=100,
            opt_projection_format_epsilon=100),
    virtual("p_tuning-mlp", PromptEncoderConfig, models.opt, encoder_hidden_size=7),
    virtual("p_tuning-lstm", PromptEncoderConfig, encoder_hidden_size=7, encoder_reparameterization_type="LSTM"),
    virtual("prefix_tuning", PrefixTuningConfig),
    virtual("prefix_tuning-projection", PrefixTuningConfig, models.opt, prefix_projection=True, encoder_hidden_size=7),
    virtual("prefix_tuning-bert", PrefixTuningConfig, models.bert, task_type="SEQ_CLS"),
    virtual("prefix_tuning-t5", PrefixTuningConfig, models.t5, task_type="SEQ_2_SEQ_LM"),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------- what checks share


def attached(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Tensor]]:
    """The case's model with its adapter, weights randomised, and inputs."""
    model, inputs = plain(case, dtype)
    get_peft_model(model, case.config)
    randomise(model)
    return model, inputs


def plain(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Tensor]]:
    model, inputs = case.tiny()
    torch.manual_seed(2)
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    return model.to(dtype), cast


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return output(model, inputs).clone()


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def far(a: Tensor, b: Tensor) -> None:
    """Where two results must differ, or the equality tested beside it would mean nothing."""
    assert (a - b).abs().max() > 1e-2


@dataclass
class Snapshot:
    """All that unloading must bring back."""

    classes: dict[str, type]
    attributes: dict[str, set[str]]
    state: dict[str, Tensor]
    parameters: dict[str, tuple[int, bool]]  # identity and requires_grad
    output: Tensor

    @classmethod
    def of(cls, model: nn.Module, inputs: dict[str, Tensor]) -> "Snapshot":
        modules = dict(model.named_modules())
        return cls(
            classes={name: type(module) for name, module in modules.items()},
            attributes={name: set(vars(module)) for name, module in modules.items()},
            state={name: tensor.clone() for name, tensor in model.state_dict().items()},
            parameters={name: (id(found), found.requires_grad) for name, found in model.named_parameters()},
            output=run(model, inputs),
        )

    def holds(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        """Assert that the model is again, bit for bit, what it was."""
        now = Snapshot.of(model, inputs)
        assert now.classes == self.classes
        assert now.attributes == self.attributes
        assert list(now.state) == list(self.state)
        assert all(same_bits(now.state[name], tensor) for name, tensor in self.state.items())
        assert now.parameters == self.parameters
        assert same_bits(now.output, self.output)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if not is_adapter(name)}


def is_adapter(name: str) -> bool:
    return ".adapters." in f".{name}"


def assert_base_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = base_state(model)
    assert list(now) == list(before)
    assert all(same_bits(now[name], value) for name, value in before.items())


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A curved function of the output; any dropout draws the same every time."""
    torch.manual_seed(3)
    y = output(model, inputs)
    return (y.double() * torch.linspace(-1, 1, y.numel()).view(y.shape).double() + y.double() ** 2 / 3).sum()


@contextmanager
def restored(parameter: nn.Parameter) -> Iterator[None]:
    kept = parameter.detach().clone()
    yield
    with torch.no_grad():
        parameter.copy_(kept)


# -------------------------------------------------------------------------------------------------------- checks


def identity_at_init(case: Case) -> None:
    """With the default initialisation an attached adapter changes no bit of the output."""
    for training in (False, True):
        model, inputs = plain(case)
        if training:
            model.requires_grad_(False)  # in training PyTorch's attention picks another kernel for frozen weights
        before = run(model.train(training), inputs)
        get_peft_model(model, case.config)
        assert same_bits(run(model, inputs), before)


def gradients_agree_with_finite_differences(case: Case) -> None:
    """Float64, along a random direction of each trained parameter and of each floating-point input."""
    model, inputs = attached(case, torch.float64)
    model.train()
    wanted = [p for p in model.parameters() if p.requires_grad]
    leaves = {key: x.requires_grad_() for key, x in inputs.items() if x.is_floating_point()}
    got = torch.autograd.grad(loss(model, inputs), [*wanted, *leaves.values()])
    step = 1e-6
    generator = torch.Generator().manual_seed(5)
    for tensor, gradient in zip([*wanted, *leaves.values()], got, strict=True):
        direction = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        direction /= direction.norm()
        with torch.no_grad(), restored(tensor):
            tensor.add_(step * direction)
            above = loss(model, inputs)
            tensor.sub_(2 * step * direction)
            below = loss(model, inputs)
        expected = (above - below) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-5, atol=1e-6)
        assert gradient.norm() > 1e-7  # a parameter that nothing depends on would agree, too


def only_adapters_train(case: Case) -> None:
    """A step of an optimizer over all parameters moves every adapter weight tensor and nothing else."""
    model, inputs = plain(case)
    names, before = [name for name, _ in model.named_parameters()], base_state(model)
    get_peft_model(model, case.config)
    randomise(model)
    own = {name: value.clone() for name, value in model.named_parameters() if is_adapter(name)}
    assert [name for name, _ in model.named_parameters() if not is_adapter(name)] == names
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(own)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    first = loss(model.train(), inputs)
    first.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(own)
    optimizer.step()
    assert loss(model, inputs) < first
    assert_base_unchanged(model, before)
    assert not any(same_bits(p, own[name]) for name, p in model.named_parameters() if name in own)


def merge_equals_active(case: Case) -> None:
    model, inputs = attached(case)
    base = case.tiny().model
    active = run(model, inputs)
    far(active, run(base, inputs))
    model.merge_adapter()
    assert all(not module.acting() for module in sites.sites(model))  # the weights do it
    close(run(model, inputs), active)


def merge_then_unmerge_restores_every_bit(case: Case) -> None:
    """A thousand times over, in bfloat16, where adding and subtracting a delta would drift."""
    model, inputs = attached(case, torch.bfloat16)
    before = Snapshot.of(model, inputs)
    for _ in range(1000):
        model.merge_adapter()
        model.unmerge_adapter()
    before.holds(model, inputs)


def merge_and_unload_gives_the_plain_model(case: Case) -> None:
    model, inputs = plain(case)
    before = Snapshot.of(model, inputs)
    model = get_peft_model(model, case.config)
    randomise(model)
    active = run(model, inputs)
    merged = model.merge_and_unload()
    now = Snapshot.of(merged, inputs)
    close(now.output, active)
    assert merged is model
    assert now.classes == before.classes
    assert now.attributes == before.attributes
    assert [(name, value.shape, value.dtype) for name, value in now.state.items()] == [
        (name, value.shape, value.dtype) for name, value in before.state.items()
    ]
    flags = {name: requires for name, (_, requires) in now.parameters.items()}
    assert flags == {name: requires for name, (_, requires) in before.parameters.items()}


def merge_in_training_keeps_the_base_out_of_it(case: Case) -> None:
    """While merged nothing in the base trains, and unmerging after that gives back a model that trains as before."""
    model, inputs = attached(case)
    before = base_state(model)
    model.merge_adapter()
    assert not any(p.requires_grad for name, p in model.named_parameters() if not is_adapter(name))
    model.unmerge_adapter()
    loss(model, inputs).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if is_adapter(name)
    }
    assert_base_unchanged(model, before)


def disabled_gives_base_outputs(case: Case) -> None:
    model, inputs = attached(case)
    active, base = run(model, inputs), run(case.tiny().model, inputs)
    with model.disable_adapter():
        assert same_bits(run(model, inputs), base)
    assert same_bits(run(model, inputs), active)


def disabled_while_merged_gives_base_outputs(case: Case) -> None:
    model, inputs = attached(case)
    base = run(case.tiny().model, inputs)
    model.merge_adapter()
    merged = run(model, inputs)
    with model.disable_adapter():
        assert same_bits(run(model, inputs), base)
    assert same_bits(run(model, inputs), merged)


def adapters_switch(case: Case) -> None:
    """Each adapter acts and trains alone; going back gives the same bits."""
    model, inputs = attached(case)
    first = run(model, inputs)
    model.add_adapter("second", case.config)
    assert same_bits(run(model, inputs), first)
    model.set_adapter("second")
    if not case.skipped("identity"):
        assert same_bits(run(model, inputs), run(case.tiny().model, inputs))
    randomise(model, seed=4)
    second = run(model, inputs)
    far(second, first)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".adapters.second." in f".{name}"}
    model.set_adapter("default")
    far(run(model, inputs), second)
    model.set_adapter("second")
    assert same_bits(run(model, inputs), second)


def rows_of_one_batch_have_their_own(case: Case) -> None:
    """Each row gives what it gives when its adapter acts on all of them; what cannot be told apart is refused."""
    model, inputs = plain(case)
    get_peft_model(model, case.config, "a")
    model.add_adapter("b", case.config)
    randomise(model)
    batch = len(next(iter(inputs.values())))
    names = ["b", "__base__", "a", "b"]
    order = torch.arange(len(names)) % batch
    rows = {key: value[order] if len(value) == batch else value for key, value in inputs.items()}
    if any(isinstance(site, sites.ReadSite) for site in sites.sites(model)):
        with pytest.raises(AdapterError, match="one adapter at a time"):
            run(model, {**rows, "adapter_names": names})
        return
    mixed = run(model, {**rows, "adapter_names": names})
    for i, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
            close(mixed[i], run(model, rows)[i])
        else:
            with model.disable_adapter():
                close(mixed[i], run(model, rows)[i])
    with model.disable_adapter():
        far(mixed[0], run(model, rows)[0])


def deleting_leaves_the_others(case: Case) -> None:
    model, inputs = attached(case)
    first = run(model, inputs)
    names = list(model.state_dict())
    model.add_adapter("second", case.config)
    model.delete_adapter("second")
    assert same_bits(run(model, inputs), first)
    assert list(model.state_dict()) == names
    model.add_adapter("second", case.config)
    with pytest.warns(UserWarning, match="now 'second' is"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert not any(".adapters.default." in f".{name}" for name in model.state_dict())
    model.delete_adapter("second")
    assert model.active_adapters == []
    assert same_bits(run(model, inputs), run(case.tiny().model, inputs))


def unload_restores_every_bit(case: Case) -> None:
    """Weights, classes, attributes, state-dict keys, which parameters train, outputs."""
    model, inputs = plain(case)
    next(model.parameters()).requires_grad_(False)  # a flag that only a faithful restoration keeps
    before = Snapshot.of(model, inputs)
    adapted = get_peft_model(model, case.config)
    adapted.add_adapter("second", case.config)
    randomise(adapted)
    loss(adapted.train(), inputs).backward()
    assert adapted.unload() is model
    before.holds(model.eval(), inputs)


def unload_while_merged_restores_every_bit(case: Case) -> None:
    model, inputs = plain(case)
    before = Snapshot.of(model, inputs)
    adapted = get_peft_model(model, case.config)
    randomise(adapted)
    adapted.merge_adapter()
    adapted.unload()
    before.holds(model, inputs)


def deepcopy_is_independent(case: Case) -> None:
    model, inputs = attached(case)
    active = run(model, inputs)
    copied = copy.deepcopy(model)
    assert type(copied) is type(model)
    assert same_bits(run(copied, inputs), active)
    randomise(copied, seed=6)
    far(run(copied, inputs), active)
    with copied.disable_adapter():
        assert same_bits(run(model, inputs), active)
    copied.unload()
    assert same_bits(run(model, inputs), active)
    assert same_bits(run(copied, inputs), run(case.tiny().model, inputs))


def pickles(case: Case) -> None:
    model, inputs = attached(case)
    restored = pickle.loads(pickle.dumps(model))
    assert type(restored) is type(model)
    assert same_bits(run(restored, inputs), run(model, inputs))
    with restored.disable_adapter():
        assert same_bits(run(restored, inputs), run(case.tiny().model, inputs))
    plain_again = restored.unload()
    assert type(plain_again) is type(case.tiny().model)


def casts_to_bfloat16(case: Case) -> None:
    """The whole model, adapters included; rounding aside it computes the same."""
    model, inputs = attached(case)
    active = run(model, inputs)
    model.to(torch.bfloat16)
    half = {key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs.items()}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    rounded = run(model, half)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - active).norm() < 0.15 * active.norm()


def trains_in_float32_on_a_bfloat16_base(case: Case) -> None:
    model, inputs = plain(case, torch.bfloat16)
    before = run(model, inputs)
    get_peft_model(model, case.config)
    if not case.skipped("identity"):
        assert same_bits(run(model, inputs), before)
    randomise(model)
    assert {p.dtype for name, p in model.named_parameters() if is_adapter(name)} == {torch.float32}
    assert run(model, inputs).dtype == torch.bfloat16
    loss(model.train(), inputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def two_active_adapters_nest(case: Case) -> None:
    """At every site that is called: h(x) = b.after(x, g(b.before(x))) with g(x) = a.after(x, f(a.before(x)))."""
    model, inputs = attached(case)
    model.add_adapter("second", case.config)
    randomise(model, seed=4)
    model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default", "second"]
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = []
    for site in sites.sites(model):
        site.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
    run(model, inputs)
    checked = 0
    for site, args, kwargs, got in calls:
        if isinstance(site, sites.ReadSite | sites.InputSite):
            continue  # merging checks the former; the latter take many arguments
        keyword = next(iter(kwargs)) if not args else None
        first = kwargs.pop(keyword) if keyword else args[0]
        rest = args[1:]

        def f(x: Any, site: Any = site, rest: Any = rest, kwargs: Any = kwargs, keyword: Any = keyword) -> Any:
            original = swap.lineage(type(site))[1].forward
            return original(site, **{keyword: x}, **kwargs) if keyword else original(site, x, *rest, **kwargs)

        def nested(x: Any, outer: list[Any], f: Any = f, site: Any = site) -> Any:
            if not outer:
                return f(x)
            return outer[-1].after(site, x, nested(outer[-1].before(site, x), outer[:-1]))

        with torch.no_grad():
            stack = [part for name in ("default", "second") for part in site.adapters[name].parts()]
            close(got, nested(first, stack))
        checked += 1
    assert checked or all(isinstance(site, sites.ReadSite) for site in sites.sites(model))


def merge_of_two_nested_adapters_equals_active(case: Case) -> None:
    model, inputs = attached(case)
    model.add_adapter("second", case.config)
    randomise(model, seed=4)
    if case.skipped("nest"):
        with pytest.raises(trimtab.AdapterError, match="replace"):
            model.set_adapter(["default", "second"])
        return
    model.set_adapter(["default", "second"])
    active = run(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(run(model, inputs), active, rtol=1e-4, atol=1e-4)


def saves_and_loads_under_another_name(case: Case) -> None:
    model, inputs = attached(case)
    active = run(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        fresh = PeftModel.from_pretrained(case.tiny().model, folder, adapter_name="other")
        assert fresh.active_adapters == ["other"]
        assert same_bits(run(fresh, inputs), active)
        assert not any(p.requires_grad for p in fresh.parameters())
        model.load_adapter(folder, "again", is_trainable=True)
    model.set_adapter("again")
    assert same_bits(run(model, inputs), active)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".adapters.again." in f".{name}"
    }
    saved, own = fresh.peft_config["other"].to_dict(), model.peft_config["default"].to_dict()
    assert {**saved, "inference_mode": None} == {**own, "inference_mode": None}


def inference_mode_trains_nothing(case: Case) -> None:
    model, _ = plain(case)
    get_peft_model(model, case.config.model_copy(update={"inference_mode": True}))
    assert not any(p.requires_grad for p in model.parameters())


def parameters_can_be_sharded(case: Case) -> None:
    """FSDP2 takes no 0-d parameters; and a parameter must lie in the order that its name says."""
    model, _ = attached(case)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            assert parameter.dim() > 0, name
            assert parameter.is_contiguous(), name


CHECKS: list[Callable[[Case], None]] = [
    identity_at_init,
    gradients_agree_with_finite_differences,
    only_adapters_train,
    merge_equals_active,
    merge_then_unmerge_restores_every_bit,
    merge_and_unload_gives_the_plain_model,
    merge_in_training_keeps_the_base_out_of_it,
    disabled_gives_base_outputs,
    disabled_while_merged_gives_base_outputs,
    adapters_switch,
    rows_of_one_batch_have_their_own,
    deleting_leaves_the_others,
    unload_restores_every_bit,
    unload_while_merged_restores_every_bit,
    deepcopy_is_independent,
    pickles,
    casts_to_bfloat16,
    trains_in_float32_on_a_bfloat16_base,
    two_active_adapters_nest,
    merge_of_two_nested_adapters_equals_active,
    saves_and_loads_under_another_name,
    inference_mode_trains_nothing,
    parameters_can_be_sharded,
]


def check(case: Case, promise: Callable[[Case], None]) -> None:
    """Run one check on one case, or see that what the case cannot do is refused."""
    if reason := case.skipped(promise.__name__):
        if "merge" in case.skips and "merge" in promise.__name__:
            refuses_to_merge(case)
        pytest.skip(reason)
    promise(case)


def refuses_to_merge(case: Case) -> None:
    model, inputs = attached(case)
    before = Snapshot.of(model, inputs)
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError):
            verb()
        before.holds(model, inputs)
