"""Prompt tuning, P-tuning and prefix tuning against HF PEFT: the same weights, the same inputs, both directions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from models import Tiny, ids, randomise
from torch import Tensor, nn

import trimtab
from trimtab import get_peft_model

P = 3
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # HF PEFT asks it

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "p-mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 7}),
    "p-lstm": ("PromptEncoderConfig", {"encoder_hidden_size": 7, "encoder_reparameterization_type": "LSTM"}),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix-mlp": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 7}),
}


def tokenwise(length: int = 5) -> Tensor:
    labels = ids(length=length).flip(1).clone()
    labels[1, -2:] = -100
    return labels


RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
LEFT = RIGHT.flip(1)

MODELS: dict[str, tuple[Callable[[], Tiny], str, dict[str, Tensor]]] = {
    "llama": (models.llama, "CAUSAL_LM", {"labels": tokenwise()}),
    "llama-right": (models.llama, "CAUSAL_LM", {"labels": tokenwise(), "attention_mask": RIGHT}),
    "llama-left": (models.llama, "CAUSAL_LM", {"labels": tokenwise(), "attention_mask": LEFT}),
    "gpt2": (models.gpt2, "CAUSAL_LM", {"labels": tokenwise(), "attention_mask": LEFT}),
    "opt": (models.opt, "CAUSAL_LM", {"labels": tokenwise(), "attention_mask": LEFT}),
    "bert": (models.bert, "SEQ_CLS", {"labels": torch.tensor([2, 0]), "token_type_ids": RIGHT}),
    "t5": (lambda: models.t5(d_kv=8, num_layers=3), "SEQ_2_SEQ_LM", {"labels": tokenwise(4), "attention_mask": RIGHT}),
}


def configs(method: str, task: str, **more: Any) -> tuple[Any, Any]:
    """HF PEFT's config and ours."""
    name, settings = METHODS[method]
    settings = {"num_virtual_tokens": P, "task_type": task, **settings, **more}
    return getattr(peft, name)(**settings), getattr(trimtab, name)(**settings)


def trained(method: str, model: str) -> tuple[Any, dict[str, Tensor]]:
    """Our model of that name with a randomised adapter, and its inputs with labels."""
    make, task, extra = MODELS[model]
    tiny = make()
    adapted = get_peft_model(tiny.model, configs(method, task)[1])
    randomise(adapted)
    inputs = {**tiny.inputs, **extra}
    if task == "SEQ_2_SEQ_LM":
        del inputs["decoder_input_ids"]
    return adapted, inputs


@torch.no_grad()
def same(ours: Any, hf: nn.Module, inputs: dict[str, Tensor]) -> None:
    mine, theirs = ours(**inputs), hf(**inputs)
    logits = theirs.logits
    if logits.dim() == 3:
        logits = logits[:, -mine.logits.shape[1] :]
    if mine.logits.dim() == 3:
        assert mine.logits.shape[:2] == inputs["labels"].shape
    torch.testing.assert_close(mine.logits, logits, **TOLERANCE)
    torch.testing.assert_close(mine.loss, theirs.loss, **TOLERANCE)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_hf_peft_reads_ours(method: str, model: str, tmp_path: Path) -> None:
    ours, inputs = trained(method, model)
    ours.save_pretrained(tmp_path)
    hf = peft.PeftModel.from_pretrained(MODELS[model][0]().model, str(tmp_path)).eval()  # any warning is an error here
    same(ours, hf, inputs)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_ours_reads_hf_peft_s(method: str, model: str, tmp_path: Path) -> None:
    make, task, extra = MODELS[model]
    tiny = make()
    torch.manual_seed(1)
    hf = peft.get_peft_model(tiny.model, configs(method, task)[0]).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    hf.save_pretrained(tmp_path)
    inputs = {**tiny.inputs, **extra}
    if task == "SEQ_2_SEQ_LM":
        del inputs["decoder_input_ids"]
    ours = trimtab.PeftModel.from_pretrained(make().model, tmp_path)
    same(ours, hf, inputs)
