"""Multitask prompt tuning: its formula, HF PEFT's results, and what a call says of tasks."""

from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from models import ids, randomise
from safetensors.torch import load_file
from test_virtual_tokens import GREEDY, MODELS, TOLERANCE, P

import trimtab
from trimtab import AdapterError, ConfigError, MultitaskPromptTuningConfig, PeftModel, get_peft_model, sites

TASKS = torch.tensor([1, 0])

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]


def trained(model: str, **settings: Any) -> tuple[Any, dict[str, Any]]:
    make, task, extra = MODELS[model]
    tiny = make()
    settings = {"num_virtual_tokens": P, "num_tasks": 3, "num_ranks": 2, "task_type": task, **settings}
    adapted = get_peft_model(tiny.model, MultitaskPromptTuningConfig(**settings))
    randomise(adapted, scale=1.0)
    inputs = {**tiny.inputs, **extra, "task_ids": TASKS}
    inputs.pop("decoder_input_ids", None)
    return adapted, inputs


@torch.no_grad()
def test_formula() -> None:
    model, inputs = trained("llama-left")
    got = model(**inputs)
    own = sites.adapters(model)["default"]
    assert [tuple(p.shape) for p in (own.embedding, own.u, own.v)] == [(3, 16), (3, 3, 2), (3, 2, 16)]
    rows = []
    for task in (1, 0):
        task_matrix = sum(torch.outer(own.u[task, :, i], own.v[task, i]) for i in range(2))
        rows.append(own.embedding * task_matrix)
    base = models.llama().model
    embeds = torch.cat([torch.stack(rows), base.get_input_embeddings()(inputs["input_ids"])], 1)
    mask = torch.cat([torch.ones(2, P, dtype=torch.long), inputs["attention_mask"]], 1)
    torch.testing.assert_close(got.logits, base(inputs_embeds=embeds, attention_mask=mask).logits[:, P:], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("model", ["llama", "llama-right", "gpt2", "bert", "t5"])
def test_both_directions_with_hf_peft(model: str, tmp_path: Path) -> None:
    ours, inputs = trained(model)
    ours.save_pretrained(tmp_path / "ours")
    assert set(load_file(tmp_path / "ours" / "adapter_model.safetensors")) == {
        "prompt_embeddings", "prefix_task_cols", "prefix_task_rows",
        *(("base_model.classifier.weight", "base_model.classifier.bias") if model == "bert" else ()),
    }  # fmt: skip
    hf = peft.PeftModel.from_pretrained(MODELS[model][0]().model, str(tmp_path / "ours")).eval()
    hf.save_pretrained(tmp_path / "hf")
    again = PeftModel.from_pretrained(MODELS[model][0]().model, tmp_path / "hf")
    theirs = hf(**inputs)
    for found in (ours, again):
        mine = found(**inputs)
        logits = theirs.logits[:, -mine.logits.shape[1] :] if mine.logits.dim() == 3 else theirs.logits
        torch.testing.assert_close((mine.logits, mine.loss), (logits, theirs.loss), **TOLERANCE)
    if model in ("llama", "t5"):
        call = {"input_ids": inputs["input_ids"], "task_ids": TASKS, "attention_mask": torch.ones(2, 5).long()}
        expected = hf.generate(**call, **GREEDY)
        assert torch.equal(ours.generate(**call, **GREEDY), expected)
        assert torch.equal(ours.generate(**call, **GREEDY, use_cache=False), expected)
        assert len(ours.generate(**call, **GREEDY, num_beams=2)) == 2


@pytest.mark.parametrize("model", ["llama", "bert", "t5"])
def test_tasks_are_said_in_every_call(model: str) -> None:
    adapted, inputs = trained(model)
    other = adapted(**{**inputs, "task_ids": TASKS.flip(0)}).logits
    assert not torch.allclose(adapted(**inputs).logits, other, atol=1e-3)
    del inputs["task_ids"]
    with pytest.raises(AdapterError, match=r"task_ids \(2,\).*got None"):
        adapted(**inputs)
    with pytest.raises(AdapterError, match=r"got \(3,\)"):
        adapted(**inputs, task_ids=torch.tensor([0, 1, 2]))
    with adapted.disable_adapter():
        bare = adapted(**inputs).logits
        assert torch.equal(adapted(**inputs, task_ids=TASKS).logits, bare)


@torch.no_grad()
def test_begins_from_source_tasks(tmp_path: Path) -> None:
    source, _ = trained("llama")
    source.save_pretrained(tmp_path)
    own = sites.adapters(source)["default"]
    path = str(tmp_path / "adapter_model.safetensors")

    def begun(init: str, where: str = path, **settings: Any) -> Any:
        torch.manual_seed(0)
        settings = {"num_virtual_tokens": P, "num_ranks": 2, "num_tasks": 1, "task_type": "CAUSAL_LM", **settings}
        settings |= {"prompt_tuning_init": init, "prompt_tuning_init_state_dict_path": where}
        hf = peft.MultitaskPromptTuningConfig(**{**settings, "prompt_tuning_init_state_dict_path": path})
        theirs = peft.get_peft_model(models.llama().model, hf).prompt_encoder["default"]
        mine = sites.adapters(get_peft_model(models.llama().model, MultitaskPromptTuningConfig(**settings)))["default"]
        assert torch.equal(mine.embedding, theirs.embedding.weight)
        if init != "ONLY_SOURCE_SHARED":
            assert torch.equal(mine.u, theirs.prefix_task_cols)
            assert torch.equal(mine.v, theirs.prefix_task_rows)
        return mine

    assert torch.equal(begun("AVERAGE_SOURCE_TASKS").u[0], own.u.mean(0))
    assert torch.equal(begun("EXACT_SOURCE_TASK", prompt_tuning_init_task=2).v[0], own.v[2])
    only = begun("ONLY_SOURCE_SHARED", str(tmp_path), num_tasks=4)
    assert torch.equal(only.embedding, own.embedding)
    assert len(only.u) == 4
    assert only.u.abs().max() < 0.1
    for settings, message in (
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_task": 3}, "init_task=3: of 3 tasks"),
        ({"prompt_tuning_init": "AVERAGE_SOURCE_TASKS", "num_ranks": 3}, r"task_cols \(3, 2\); \(3, 3\) is needed"),
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": "./no"}, "'no' is no safe"),
    ):
        given = {"num_virtual_tokens": P, "num_ranks": 2, "prompt_tuning_init_state_dict_path": path, **settings}
        with pytest.raises(ConfigError, match=message):
            get_peft_model(models.llama().model, MultitaskPromptTuningConfig(**given))
    with pytest.raises(ConfigError, match="needs prompt_tuning_init_state_dict_path too"):
        MultitaskPromptTuningConfig(prompt_tuning_init="EXACT_SOURCE_TASK")
    with pytest.raises(ConfigError, match="in training and not in generation"):
        get_peft_model(models.t5().model, MultitaskPromptTuningConfig(num_transformer_submodules=2))


def test_learns_two_tasks_at_once() -> None:
    """The same rows, in task 0 labelled one way and in task 1 the other."""
    tokens = ids(8, 6)
    task_ids = torch.tensor([0, 1] * 8)
    labels = ((tokens[:, 0] > 32).repeat_interleave(2) ^ (task_ids == 1)).long()
    batch = {"input_ids": tokens.repeat_interleave(2, 0), "labels": labels}
    model = models.bert().model
    frozen = model(**batch).loss.item()
    torch.manual_seed(0)
    config = MultitaskPromptTuningConfig(num_virtual_tokens=P, num_tasks=2, num_ranks=2, task_type="SEQ_CLS")
    trimtab.get_peft_model(model, config).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(**batch, task_ids=task_ids).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.4 * frozen
