"""Activated LoRA: its formula, HF PEFT's logits and generation, caches, padding."""

import copy
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from models import ids, randomise
from test_virtual_tokens import GREEDY, TOLERANCE
from torch import Tensor

from trimtab import (
    AdapterError,
    ConfigError,
    LoraConfig,
    MergeError,
    PeftModel,
    PromptTuningConfig,
    TargetError,
    get_peft_model,
)

CALL = [9, 7]
SETTINGS: dict[str, Any] = {
    "r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM",
    "alora_invocation_tokens": CALL,
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def tokens() -> Tensor:
    """Rows with the invocation in the middle, twice, at the end, half of it, and without."""
    rows = ids(5, 8)
    rows[0, 3:5] = torch.tensor(CALL)
    rows[1, 1:3] = rows[1, 4:6] = torch.tensor(CALL)
    rows[2, 6:] = torch.tensor(CALL)
    rows[3, 7] = CALL[0]
    return rows


STARTS = [3, 4, 6, 8, 8]


def adapted(make: Any = models.llama, **settings: Any) -> Any:
    model = get_peft_model(make().model, LoraConfig(**{**SETTINGS, **settings}))
    randomise(model)
    return model


@torch.no_grad()
def test_each_site_by_the_formula() -> None:
    model = adapted()
    seen: list[tuple[Any, Tensor, Tensor]] = []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            module.register_forward_hook(lambda site, args, y: seen.append((site, args[0], y)))
    model(tokens())
    assert len(seen) == 4
    for site, x, y in seen:
        own = site.adapters["default"]
        for row, start in enumerate(STARTS):
            for t in range(8):
                expected = site.weight @ x[row, t]
                if t >= start:
                    expected = expected + 2.5 * own.B @ own.A @ x[row, t]
                torch.testing.assert_close(y[row, t], expected, **TOLERANCE)


@torch.no_grad()
def test_two_act_each_from_its_own_invocation() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(**{**SETTINGS, "alora_invocation_tokens": [int(tokens()[0, 6])]}))
    randomise(model, seed=4)
    model.set_adapter(["default", "other"])
    seen: list[tuple[Any, Tensor, Tensor]] = []
    site = model.model.layers[1].mlp.down_proj
    site.register_forward_hook(lambda site, args, y: seen.append((site, args[0], y)))
    model(tokens()[:1])
    [(_, x, y)] = seen
    for t in range(8):
        expected = site.weight @ x[0, t]
        for name, start in (("default", 3), ("other", 6)):
            if t >= start:
                expected = expected + 2.5 * site.adapters[name].B @ site.adapters[name].A @ x[0, t]
        torch.testing.assert_close(y[0, t], expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_both_directions_with_hf_peft(name: str, tmp_path: Path) -> None:
    make = models.TRANSFORMERS[name]
    targets = ["c_attn", "c_fc"] if name == "gpt2" else ["q_proj", "v_proj"]
    ours = adapted(make, target_modules=targets)
    ours.save_pretrained(tmp_path / "ours")
    hf = peft.PeftModel.from_pretrained(make().model, str(tmp_path / "ours"), is_trainable=True)
    hf.save_pretrained(tmp_path / "hf")
    again: Any = PeftModel.from_pretrained(make().model, tmp_path / "hf", is_trainable=True)
    results = [model(tokens(), labels=tokens()) for model in (hf, ours, again)]
    for result in results[1:]:
        torch.testing.assert_close(result.logits, results[0].logits, **TOLERANCE)
    plain = make().model(tokens()).logits
    assert torch.equal(results[1].logits[3:], plain[3:])
    assert (results[1].logits[:3] - plain[:3]).abs().amax((1, 2)).min() > 1e-3
    for result in results[:2]:
        result.loss.backward()
    theirs = {name: p.grad for name, p in hf.named_parameters() if p.requires_grad}
    mine = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    for (key, gradient), (other, expected) in zip(sorted(mine.items()), sorted(theirs.items()), strict=True):
        torch.testing.assert_close(gradient, expected, msg=f"{key} {other}", **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_generates_alike_with_and_without_a_cache_and_behind_padding(name: str, tmp_path: Path) -> None:
    make = models.TRANSFORMERS[name]
    ours = adapted(make, target_modules=["q_proj", "v_proj"])
    ours.save_pretrained(tmp_path)
    hf = peft.PeftModel.from_pretrained(make().model, str(tmp_path)).eval()
    rows = tokens()
    mask = torch.ones_like(rows)
    expected = hf.generate(input_ids=rows, attention_mask=mask, **GREEDY)
    with ours.disable_adapter():
        assert not torch.equal(ours.generate(rows, attention_mask=mask, **GREEDY), expected)
    for cache in (True, False):
        assert torch.equal(ours.generate(rows, attention_mask=mask, use_cache=cache, **GREEDY), expected)
    pad = torch.zeros(5, 3, dtype=torch.long)
    padded, seen = torch.cat([pad, rows], 1), torch.cat([pad, mask], 1)
    for cache in (True, False):
        found = ours.generate(padded, attention_mask=seen, use_cache=cache, **GREEDY)
        assert torch.equal(found[:, 3:], expected)
    assert torch.equal(ours.generate(rows[:2], attention_mask=mask[:2], num_beams=1, **GREEDY), expected[:2])
    together = ours.generate(rows, attention_mask=mask, num_beams=3, **GREEDY)
    alone = [ours.generate(row[None], attention_mask=mask[:1], num_beams=3, **GREEDY) for row in rows]
    assert torch.equal(together, torch.cat(alone))
    right = ours(torch.cat([rows, pad], 1), attention_mask=torch.cat([mask, pad], 1)).logits[:, :8]
    torch.testing.assert_close(right, ours(rows).logits, **TOLERANCE)


@torch.no_grad()
def test_goes_on_from_the_base_s_cache() -> None:
    """What is before the invocation is computed by the base, once, for two adapters; and each goes on with its own."""
    model = adapted()
    model.add_adapter("other", LoraConfig(**{**SETTINGS, "alora_invocation_tokens": [9]}))
    randomise(model, seed=4)
    rows = tokens()[:1]  # begins at 3
    with model.disable_adapter():
        shared = model(rows[:, :3]).past_key_values
    for name in ("default", "other"):
        model.set_adapter(name)
        whole = model(rows).logits
        cache = copy.deepcopy(shared)
        parts = []
        for piece in (rows[:, 3:5], rows[:, 5:6], rows[:, 6:]):
            result = model(piece, past_key_values=copy.deepcopy(cache))
            cache = result.past_key_values
            parts.append(result.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole[:, 3:], **TOLERANCE)
        with pytest.raises(AdapterError, match="filled with 1 rows; these are 2"):
            model(rows[:, 5:6].expand(2, -1), past_key_values=copy.deepcopy(cache))


def test_gradient_checkpointing_recomputes_the_same() -> None:
    found = []
    for checkpointed in (False, True):
        model = adapted().train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(tokens(), labels=tokens()).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@torch.no_grad()
def test_acts_beside_virtual_tokens() -> None:
    """Whichever is attached first: places are counted from the end."""
    model = adapted()
    prompt = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model.add_adapter("prompt", prompt)
    randomise(model, seed=4)
    model.set_adapter(["prompt", "default"])
    both = model(tokens()).logits
    model.set_adapter("prompt")
    alone = model(tokens()).logits
    for row, start in enumerate(STARTS):
        assert torch.equal(both[row, :start], alone[row, :start])
        assert start == 8 or not torch.allclose(both[row, start:], alone[row, start:], atol=1e-3)


def test_learns_what_the_base_does_not_see() -> None:
    """To answer the invocation with the row's first token, while rows without it stay the base's."""
    rows = ids(16, 6)
    rows[:, 3:5] = torch.tensor(CALL)
    rows[:, 5] = rows[:, 0]
    labels = torch.full_like(rows, -100)
    labels[:, 5] = rows[:, 5]
    torch.manual_seed(0)
    config = LoraConfig(**{**SETTINGS, "r": 8, "target_modules": "all-linear"})
    model: Any = get_peft_model(models.llama().model, config)
    before = model(tokens()[3:]).logits
    frozen = model(rows, labels=labels).loss.item()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(rows, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * frozen
    assert torch.equal(model(tokens()[3:]).logits, before)


def test_refuses_what_means_nothing() -> None:
    model = adapted()
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="from its invocation on, and a weight acts on all"):
            verb()
    with pytest.raises(AdapterError, match="inputs_embeds do not tell"):
        model(inputs_embeds=torch.randn(1, 4, 16))
    with torch.no_grad():
        model(tokens())
        with pytest.raises(AdapterError, match="calls of the whole model"):
            model.model(tokens())
    for settings, error, message in (
        ({"alora_invocation_tokens": []}, ConfigError, "at least 1 item"),
        ({"bias": "all"}, ConfigError, "bias='all' cannot go .* Closest: 'none'"),
        ({"use_dora": True}, ConfigError, "use_dora=True cannot go"),
        ({"init_lora_weights": "pissa"}, ConfigError, "init_lora_weights='pissa' cannot go"),
        ({"target_modules": ["embed_tokens"]}, TargetError, "embed_tokens is no linear layer"),
    ):
        with pytest.raises(error, match=message):
            adapted(**settings)
    with pytest.raises(TargetError, match="one sequence of input_ids"):
        adapted(models.t5, target_modules=["q"])
    with pytest.raises(TargetError, match="one sequence of input_ids; Mlp is none"):
        adapted(models.mlp, target_modules=["first"])
