"""LLaMA-Adapter: its formula, and HF PEFT's results."""

from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from models import Tiny, randomise
from torch import Tensor

import trimtab
from trimtab import AdaptionPromptConfig, ConfigError, LoraConfig, PeftModel, TargetError, get_peft_model

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
MODELS: dict[str, Any] = {"llama": models.llama, "gpt2": models.gpt2}

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def batch(tiny: Tiny) -> dict[str, Tensor]:
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    return {**tiny.inputs, "attention_mask": mask, "labels": tiny.inputs["input_ids"]}


@torch.no_grad()
def test_formula() -> None:
    """Against attention written out for one head after the other, of which two share keys and values."""
    tiny = models.llama()
    seen: list[Tensor] = []
    tiny.model.model.layers[1].self_attn.register_forward_hook(lambda *call: seen.append(call[2][0]))
    model = get_peft_model(tiny.model, AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
    assert model.get_nb_trainable_parameters()[0] == 3 * 16 + 1
    randomise(model)
    model(**tiny.inputs)
    with model.disable_adapter():
        model(**tiny.inputs)
    attention, rope = model.model.layers[1].self_attn, model.model.rotary_emb
    prompt, gate = attention.adapters["default"].adaption_prompt[0], attention.adapters["default"].adaption_gate
    x = model.model.layers[0](model.model.embed_tokens(tiny.inputs["input_ids"]), position_embeddings=rope(
        torch.zeros(1), torch.arange(5)[None]))  # fmt: skip
    x = model.model.layers[1].input_layernorm(x)[0]
    angles = torch.arange(5)[:, None] * rope.inv_freq[None]  # (T, 2): two frequencies for heads of width 4
    heads = []
    for head in range(4):
        q = (x @ attention.q_proj.weight.T)[:, 4 * head : 4 * head + 4]
        turned = []
        for i in range(2):  # dimensions i and i + 2 turn together
            a, b, angle = q[:, i], q[:, i + 2], angles[:, i]
            turned.append((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()))
        q = torch.stack([turned[0][0], turned[1][0], turned[0][1], turned[1][1]], 1)
        own = slice(4 * (head // 2), 4 * (head // 2) + 4)
        k, v = (prompt @ attention.k_proj.weight.T)[:, own], (prompt @ attention.v_proj.weight.T)[:, own]
        heads.append(gate * (q @ k.T / 2).softmax(-1) @ v)
    expected = torch.cat(heads, 1) @ attention.o_proj.weight.T
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(seen[0][0] - seen[1][0], expected, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_hf_peft_reads_ours(model: str, layers: int, tmp_path: Path) -> None:
    tiny = MODELS[model]()
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=layers, task_type="CAUSAL_LM")
    ours = get_peft_model(tiny.model, config)
    randomise(ours, scale=1.0)
    ours.save_pretrained(tmp_path)
    hf = peft.PeftModel.from_pretrained(MODELS[model]().model, str(tmp_path)).eval()
    mine, theirs = ours(**batch(tiny)), hf(**batch(tiny))
    torch.testing.assert_close((mine.logits, mine.loss), (theirs.logits, theirs.loss), **TOLERANCE)
    greedy = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    tokens = {key: value for key, value in batch(tiny).items() if key != "labels"}
    generated = ours.generate(**tokens, **greedy)
    assert torch.equal(ours.generate(**tokens, **greedy, use_cache=False), generated)
    assert torch.equal(hf.generate(**tokens, **greedy), generated)


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
def test_ours_reads_hf_peft_s(model: str, tmp_path: Path) -> None:
    tiny = MODELS[model]()
    hf = peft.get_peft_model(
        tiny.model, peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    ).eval()
    torch.manual_seed(0)
    for name, parameter in hf.named_parameters():
        if "adaption_" in name:
            parameter.normal_()
    hf.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(MODELS[model]().model, tmp_path)
    torch.testing.assert_close(ours(**batch(tiny)).logits, hf(**batch(tiny)).logits, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("model", ["opt", "bert"])
def test_formula_without_rotation(model: str) -> None:
    """On OPT with the output projection inside attention, on BERT with it behind."""
    tiny = getattr(models, model)()
    layers = tiny.model.model.decoder.layers if model == "opt" else tiny.model.bert.encoder.layer
    attention = layers[1].self_attn if model == "opt" else layers[1].attention.self
    seen: list[Any] = []
    attention.register_forward_hook(lambda *call: seen.append((call[2] or {}, call[3])), with_kwargs=True)
    get_peft_model(tiny.model, AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
    randomise(tiny.model)
    hidden: list[Tensor] = []
    first = attention.q_proj if model == "opt" else attention.query
    first.register_forward_hook(lambda *call: hidden.append(call[1][0]))
    tiny.model(**tiny.inputs)
    with tiny.model.disable_adapter():
        tiny.model(**tiny.inputs)
    names = ("q_proj", "k_proj", "v_proj") if model == "opt" else ("query", "key", "value")
    q_of, k_of, v_of = (getattr(attention, name) for name in names)
    own = attention.adapters["default"]
    q, k, v = q_of(hidden[0]), k_of(own.adaption_prompt[0]), v_of(own.adaption_prompt[0])
    heads = []
    for part in (slice(0, 8), slice(8, 16)):
        heads.append(own.adaption_gate * (q[..., part] @ k[:, part].T / 8**0.5).softmax(-1) @ v[:, part])
    expected = torch.cat(heads, -1)
    if model == "opt":
        expected = attention.out_proj(expected)
    torch.testing.assert_close(seen[0][1][0] - seen[1][1][0], expected, **TOLERANCE)


@torch.no_grad()
def test_several_add_up_and_lora_acts_beside() -> None:
    tiny = models.gpt2()
    seen: list[Tensor] = []
    tiny.model.transformer.h[1].attn.register_forward_hook(lambda *call: seen.append(call[2][0]))
    model = get_peft_model(tiny.model, AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
    model.add_adapter("second", AdaptionPromptConfig(adapter_len=2, adapter_layers=1))
    model.add_adapter("lora", LoraConfig(target_modules=["c_fc"], layers_to_transform=[1]))
    randomise(model)
    for names in ([], ["default"], ["second"], ["default", "second"]):
        model.set_adapter(names)
        logits = model(**tiny.inputs).logits
    base, first, second, both = seen
    torch.testing.assert_close(both - base, (first - base) + (second - base), **TOLERANCE)
    model.set_adapter(["default", "second", "lora"])
    assert not torch.allclose(model(**tiny.inputs).logits, logits)
    torch.testing.assert_close(seen[-1], both)


@pytest.mark.parametrize(
    ("tiny", "settings", "error", "message"),
    [
        (models.mlp, {}, TargetError, "Mlp has no attention with a cache"),
        (models.t5, {}, TargetError, "T5Attention, which LLaMA-Adapter does not know"),
        (models.llama, {"adapter_layers": 3}, ConfigError, "adapter_layers=3, but the model has 2. Closest: 2"),
        (models.llama, {"target_modules": "attn"}, TargetError, "'attn' is no attention.*'self_attn'"),
        (models.llama, {"adapter_len": 0}, ConfigError, "adapter_len=0"),
    ],
)
def test_nonsense_is_refused(tiny: Any, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        get_peft_model(tiny().model, trimtab.AdaptionPromptConfig(**settings))
