"""HF PEFT's adapters here and ours there, for every method that both have: equal outputs. One line per case."""

import copy
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from models import Tiny, output, randomise
from torch import nn

import trimtab


class Pixels(nn.Module):
    """Convolutions with nothing that HF PEFT gets wrong or refuses: no dilation, no groups, padding with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.plane = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.point(torch.tanh(self.plane(x)))).mean((2, 3)))


def pixels() -> Tiny:
    torch.manual_seed(0)
    return Tiny(Pixels().eval(), {"x": torch.randn(2, 4, 9, 9)})


TINY = {
    **models.TRANSFORMERS,
    **models.PLAIN,
    "pixels": pixels,
    "mixtral": models.mixtral,
    "gpt_oss": models.gpt_oss,
    "experts": models.experts,
    "transposed": partial(models.experts, True),
}
ATTENTION = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bert": ["query", "value", "output.dense"],
    "t5": ["q", "v", "wo"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "opt": ["q_proj", "v_proj", "fc2"],
    "vit": ["q_proj", "v_proj", "fc2"],
    "mlp": ["first", "second"],
}
LAST = {"llama": "down_proj", "bert": "output.dense", "t5": "wo", "gpt2": "mlp.c_proj", "opt": "fc2", "vit": "fc2"}
NO_GPT2 = ("llama", "bert", "t5", "opt", "vit")  # HF PEFT has it for nn.Linear only
SHARED = "(randlora_A|randlora_B)"
TOKENS = [60, *range(5, 64, 3)]  # in no order

Row = tuple[str, str, dict[str, Any]]


def rows(method: str, architectures: Any = tuple(LAST), **settings: Any) -> list[Row]:
    """The same settings on each architecture; a function of the architecture's name gives settings that differ."""
    return [
        (method, name, {
            "target_modules": ATTENTION.get(name),
            **{key: value(name) if callable(value) else value for key, value in settings.items()},
        })
        for name in architectures
    ]  # fmt: skip


CASES = [
    *rows("IA3", feedforward_modules=lambda name: [LAST[name]]),
    *rows("IA3", ["llama"], feedforward_modules=r".*\.(down_proj)", target_modules=r".*\.(k_proj|down_proj)"),
    *rows("IA3", ["bert"], feedforward_modules=[], target_modules=["key"], task_type="SEQ_CLS"),
    *rows("IA3", ["convolutions"], target_modules=["volume", "plane"], feedforward_modules=["plane"]),
    *rows("LNTuning", ["llama", "t5"], target_modules=None),
    *rows("LNTuning", ["bert"], target_modules=["LayerNorm"], task_type="SEQ_CLS"),
    *rows("LNTuning", ["gpt2"], target_modules=["ln_1", "ln_f"]),
    *rows("LNTuning", ["opt"], target_modules=["self_attn_layer_norm", "final_layer_norm"]),
    *rows("LNTuning", ["vit"], target_modules=["layernorm_before", "layernorm"]),
    *rows("Lora", use_dora=True, r=2, lora_alpha=6),
    *rows("Lora", ["bert", "opt", "gpt2"], use_dora=True, r=2, bias="all"),
    *rows("Lora", ["convolutions"], use_dora=True, r=2, target_modules=["volume", "head"]),
    *rows("Lora", ["embeddings"], use_dora=True, r=2, target_modules=["token", "head"]),
    *rows("Lora", r=2, lora_alpha=3, init_lora_weights="pissa"),
    *rows("Lora", ["llama"], r=2, lora_alpha=6, init_lora_weights="pissa", use_dora=True),
    *rows("Lora", ["llama", "bert", "opt", "vit"], r=2, lora_alpha=3, init_lora_weights="olora"),
    *rows("Lora", ["bert"], r=2, lora_alpha=6, init_lora_weights="orthogonal"),
    *rows(
        "Lora",
        ["mixtral", "gpt_oss"],
        r=2,
        lora_alpha=5,
        target_modules=["q_proj"],
        rank_pattern={"down_proj": 3},
        target_parameters=lambda name: ["gate_up_proj", "down_proj", "gate.weight"][: 3 if name == "mixtral" else 2],
    ),
    *rows("Lora", ["experts", "transposed"], r=2, target_modules=["inner"], target_parameters=["up", "down"]),
    *rows("Lora", ["mixtral"], r=2, use_rslora=True, target_modules=[], target_parameters=["experts.down_proj"]),
    *rows("Vera", r=5, projection_prng_key=0),
    *rows("Vera", ["llama"], r=5, projection_prng_key=3, save_projection=False),
    *rows("Vera", ["bert", "opt"], r=3, bias="vera_only", d_initial=0.5),
    *rows("Vera", ["opt"], r=3, bias="all"),
    *rows("Pvera", r=5, projection_prng_key=0),
    *rows("Pvera", ["llama"], r=5, projection_prng_key=3, save_projection=False),
    *rows("Pvera", ["bert", "opt"], r=3, bias="pvera_only", d_initial=0.5, pvera_dropout=0.3),
    *rows("Beft", NO_GPT2),
    *rows("Beft", ["llama", "bert", "t5", "opt"], target_modules=None, init_weights=False),
    *rows("Psoft", NO_GPT2, r=4),
    *rows("Psoft", ["llama"], r=4, psoft_alpha=3, ab_svd_init="pissa_init", psoft_mag_b=False),
    *rows("Psoft", ["bert"], r=3, psoft_svd="lowrank", random_seed=5, psoft_svd_lowrank_niter=2, init_weights=False),
    *rows("Psoft", ["opt"], r=5, use_cayley_neumann=True, num_cayley_neumann_terms=6, cayley_neumann_eps=0.3),
    *rows("Psoft", ["vit"], r=4, psoft_orth=False, psoft_mag_a=False, psoft_dropout=0.5),
    *rows("Peanut", NO_GPT2, r=4),
    *rows("Peanut", ["llama", "bert"], r=3, depth=3, act_fn="gelu", scaling=0.5),
    *rows("Peanut", ["opt"], r=3, depth=1, act_fn="leaky_relu", init_weights=False),
    *[
        row
        for name in ("gelu_pytorch_tanh", "mish", "relu6", "sigmoid", "silu", "swish", "tanh")
        for row in rows("Peanut", ["mlp"], r=3, act_fn=name)
    ],
    *rows("LoHa", NO_GPT2, r=3, alpha=5),
    *rows("LoHa", ["llama"], r=3, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 1}),
    *rows("LoHa", ["pixels"], r=2, target_modules=["plane", "head"], use_effective_conv2d=False),
    *rows("LoHa", ["convolutions"], r=2, target_modules=["line", "head"], use_effective_conv2d=True),
    *rows("LoKr", NO_GPT2, r=2, alpha=5),
    *rows("LoKr", ["llama", "mlp"], r=1, alpha=3, decompose_both=True, decompose_factor=2),
    *rows("LoKr", ["llama"], r=8, decompose_factor=3),
    *rows("LoKr", ["pixels"], r=1, target_modules=["plane", "point"], use_effective_conv2d=True),
    *rows("LoKr", ["pixels"], r=1, target_modules=["plane", "point"], use_effective_conv2d=False),
    *rows("LoKr", ["pixels"], r=6, target_modules=["plane", "point"]),
    *rows("LoHa", ["pixels"], r=2, target_modules=["plane", "point"], use_effective_conv2d=True),
    *rows("LoKr", ["convolutions"], r=1, target_modules=["line"], use_effective_conv2d=False),
    *rows("LoKr", ["convolutions"], r=8, target_modules=["line"]),
    *rows("Miss", NO_GPT2, r=4),
    *rows("Miss", ["llama", "mlp"], r=3),
    *rows("Miss", ["bert"], r=4, bias="MiSS_only", init_weights=False),
    *rows("Miss", ["opt"], r=4, bias="all"),
    *rows("Miss", ["llama"], r=2, init_weights="mini", mini_r=4),
    *rows("Miss", ["llama", "bert"], r=4, init_weights="bat"),
    *rows("Delora", NO_GPT2, r=4),
    *rows("Delora", ["llama"], r=4, delora_lambda=2, rank_pattern={"v_proj": 3}, lambda_pattern={"q_proj": 9.5}),
    *rows("Delora", ["bert"], r=2, bias="delora_only", init_weights=False),
    *rows("FourierFT", n_frequency=60),
    *rows("FourierFT", ["llama"], n_frequency=90, scaling=70.5, random_loc_seed=3, n_frequency_pattern={"v_proj": 50}),
    *rows("FourierFT", ["bert"], n_frequency=50, bias="fourier_only", init_weights=True),
    *rows("OFT", NO_GPT2, oft_block_size=8),
    *rows("OFT", ["llama"], oft_block_size=4, bias="none", use_cayley_neumann=False),
    *rows("OFT", ["llama"], oft_block_size=0, r=2, block_share=True, num_cayley_neumann_terms=7),
    *rows("OFT", ["bert"], oft_block_size=4, coft=True, eps=0.5, bias="oft_only"),
    *rows("OFT", ["embeddings"], oft_block_size=3, target_modules=["token"]),
    *rows("OFT", ["pixels"], oft_block_size=4, target_modules=["head"]),
    *rows("BOFT", NO_GPT2, boft_block_size=4),
    *rows("BOFT", ["bert"], boft_block_size=0, boft_block_num=2, bias="boft_only"),
    *rows("BOFT", ["pixels"], boft_block_size=6, target_modules=["plane"]),
    *rows("RandLora", r=5, randlora_alpha=20, projection_prng_key=0),
    *rows("RandLora", ["llama", "gpt2"], r=3, randlora_alpha=9, projection_prng_key=4, save_projection=False),
    *rows("RandLora", ["llama"], r=3, randlora_alpha=9, sparse=True, save_projection=False),
    *rows("RandLora", ["gpt2"], r=3, randlora_alpha=9, very_sparse=True, save_projection=False),
    *rows("RandLora", ["bert"], r=20, bias="randlora_only", init_weights=False),
    *rows("Shira", NO_GPT2, r=4),
    *rows("Shira", ["llama"], r=2, random_seed=3, init_weights=False),
    *rows("WaveFT", n_frequency=60, scaling=3),
    *rows("WaveFT", ["mlp", "gpt2"], n_frequency=15, scaling=3, wavelet_family="db4", random_loc_seed=9),
    *rows("WaveFT", ["mlp"], n_frequency=15, wavelet_family="db10", n_frequency_pattern={"second": 10}),
    *rows("WaveFT", ["llama"], n_frequency=90, proportional_parameters=True, scaling=3, init_weights=False),
    *rows("WaveFT", ["bert"], n_frequency=50, bias="waveft_only", use_idwt=False, scaling=3),
    *rows("UniLora", r=3),
    *rows("UniLora", ["llama", "gpt2"], r=2, theta_d_length=300, proj_seed=5),
    *rows("UniLora", ["bert"], r=2, bias="unilora_only", init_weights=False, theta_d_length=90),
    *rows("TinyLora", u=9),
    *rows("TinyLora", ["llama", "gpt2"], r=3, u=5, weight_tying=0.5, projection_seed=5, save_projection=False),
    *rows("TinyLora", ["bert"], r=3, u=5, weight_tying=1, bias="tinylora_only", init_weights="uniform"),
    *rows("TinyLora", ["embeddings"], u=5, target_modules=["token", "head"]),
    *rows("VBLoRA", r=3, num_vectors=20, vector_length=4),
    *rows("VBLoRA", ["bert"], r=2, num_vectors=20, vector_length=4, topk=3, bias="vblora_only"),
    *rows("C3A", NO_GPT2, block_size=4),
    *rows("C3A", ["llama"], block_size=8, block_size_pattern={"v_proj": 2}, init_weights=True),
    *rows("C3A", ["bert"], block_size=2, bias="c3a_only"),
    *rows("C3A", ["opt"], block_size=8, bias="all", init_weights="gaussian"),
    *rows("Road", NO_GPT2, group_size=4),
    *rows("Road", ["llama"], group_size=8, variant="road_2"),
    *rows("Road", ["bert"], group_size=2, variant="road_4", init_weights=False),
    *rows("Hira", r=3),
    *rows("Hira", ["llama"], r=3, init_weights="gaussian"),
    *rows("Hira", ["bert"], r=2, init_weights=False, hira_dropout=0.5),
    *rows("Hira", ["pixels"], r=2, target_modules=["plane", "point", "head"]),
    *rows("Hira", ["embeddings"], r=2, target_modules=["token", "head"]),
    *rows("Gralora", r=4, alpha=6),
    *rows("Gralora", ["llama", "gpt2"], r=8, gralora_k=4, hybrid_r=3),
    *rows("Gralora", ["bert"], r=2, gralora_k=1, bias="gralora_only", init_weights=False, gralora_dropout=0.5),
    *rows("Glora", NO_GPT2, r=3),
    *rows("Glora", ["llama", "bert"], config_A_B="vector", config_C="vector", config_D_E="vector"),
    *rows("Glora", ["opt"], config_A_B="none", config_C="lora", config_D_E="none"),
    *rows("Glora", ["bert"], r=2, config_A_B="constant", config_D_E="vector", bias="glora_only", init_weights=False),
    *rows("TrainableTokens", ["llama", "opt", "bert", "t5", "gpt2"], target_modules=None, token_indices=TOKENS),
    *rows("TrainableTokens", ["llama"], target_modules=["lm_head"], token_indices=[9, 2]),
    *rows("Lora", ["llama", "bert", "gpt2", "opt"], r=2, trainable_token_indices=TOKENS),
    *rows("Lora", ["llama"], r=2, trainable_token_indices={"embed_tokens": TOKENS, "lm_head": [3, 1]}),
    *rows("HRA", NO_GPT2, r=4),
    *rows("HRA", ["bert"], r=3, init_weights=False, bias="hra_only"),
    *rows("HRA", ["opt"], r=4, apply_GS=True, init_weights=False),
    *rows("HRA", ["pixels"], r=2, target_modules=["plane", "head"]),
]

# Ranks higher than the matrix: refused in a new adapter, but HF PEFT takes them, and its files must load.
ABOVE = [
    *rows("Lora", ["mlp"], r=9),
    *rows("LoHa", ["mlp", "pixels"], r=9, target_modules=lambda name: ["first"] if name == "mlp" else ["head"]),
    *rows("LoKr", ["pixels"], r=8, target_modules=["plane", "point"]),
    *rows("Hira", ["mlp"], r=9),
    *rows("HRA", ["mlp"], r=10, target_modules=["first"]),
    *rows("TinyLora", ["mlp"], r=9, u=5),
    *rows("UniLora", ["llama"], r=2, theta_d_length=500),  # numbers that no entry takes
]


def name_of(row: Row) -> str:
    method, tiny, settings = row
    shown = {key: value for key, value in settings.items() if key != "target_modules" and not isinstance(value, list)}
    return "-".join([method, tiny, *(key if value is True else f"{key}={value}" for key, value in shown.items())])


@pytest.fixture(autouse=True)
def _quiet_peft() -> Iterator[None]:
    """HF PEFT comments on what it corrects by itself: none of our business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def pair(row: Row) -> tuple[Tiny, nn.Module]:
    """A tiny model, and a copy of its base for the other side.

    transformers starts weights so small that attention hardly looks at its scores: these are larger. T5's are large.
    """
    tiny = TINY[row[1]]()
    if row[1] in models.TRANSFORMERS and row[1] != "t5":
        for parameter in tiny.model.parameters():
            parameter.data *= 3 if parameter.dim() > 1 else 1
    return tiny, copy.deepcopy(tiny.model)


def run(model: nn.Module, tiny: Tiny) -> torch.Tensor:
    with torch.no_grad():
        return output(model, tiny.inputs).clone()


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest output: the two libraries round in different orders."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("row", [*CASES, *ABOVE], ids=name_of)
def test_hf_peft_s_adapter_acts_the_same_here(row: Row, tmp_path: Path) -> None:
    method, _, settings = row
    tiny, base = pair(row)
    plain = run(base, tiny)
    theirs = peft.get_peft_model(tiny.model, getattr(peft, f"{method}Config")(**settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                scale = 0.1 if "modules_to_save" in name else 0.3
                parameter.add_(scale * torch.randn_like(parameter))
    theirs.eval().save_pretrained(tmp_path)
    expected = run(theirs, tiny)
    ours = trimtab.PeftModel.from_pretrained(base, tmp_path).eval()
    close(run(ours, tiny), expected)
    assert (expected - plain).abs().max() > 1e-3  # else the adapter did nothing and the equality says nothing


@pytest.mark.parametrize("row", CASES, ids=name_of)
def test_our_adapter_acts_the_same_there(row: Row, tmp_path: Path) -> None:
    method, _, settings = row
    tiny, base = pair(row)
    plain = run(base, tiny)
    ours = trimtab.get_peft_model(tiny.model, getattr(trimtab, f"{method}Config")(**settings)).eval()
    randomise(ours)
    expected = run(ours, tiny)
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Unexpected keyword")
        warnings.filterwarnings("error", "Found missing adapter keys")
        # What all layers share it fills at the root, but also misses the copies that it saves for every layer.
        warnings.filterwarnings("ignore", rf"Found missing adapter keys [^:]*: \[('\S*\.{SHARED}\.default'(, )?)+\]\.$")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    close(run(theirs, tiny), expected)
    assert (expected - plain).abs().max() > 1e-3
