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
from transformers import LlamaForSequenceClassification

import trimtab
from trimtab import AdapterError, PromptTuningConfig, get_peft_model

P = 3
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),  # HF PEFT asks it
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),  # HF PEFT says it whenever it generates
]

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


# -------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
@pytest.mark.parametrize("model", ["llama-left", "gpt2", "opt", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_generates_what_hf_peft_does(method: str, model: str, tmp_path: Path) -> None:
    """Row by row, with a cache and without, and all rows together behind padding.

    (Behind padding HF PEFT itself generates other tokens than row by row: it drops position_ids.)
    """
    ours, inputs = trained(method, model)
    mask = inputs["attention_mask"]
    ours.save_pretrained(tmp_path)
    hf = peft.PeftModel.from_pretrained(MODELS[model][0]().model, str(tmp_path)).eval()
    alone = []
    for row, seen in zip(inputs["input_ids"], mask.bool(), strict=True):
        single = {"input_ids": row[seen][None], "attention_mask": mask[:1, : int(seen.sum())] * 0 + 1}
        expected = hf.generate(**single, **GREEDY)
        assert torch.equal(ours.generate(**single, **GREEDY), expected)
        assert torch.equal(ours.generate(**single, **GREEDY, use_cache=False), expected)
        alone.append(expected[0, -5:])
    together = ours.generate(input_ids=inputs["input_ids"], attention_mask=mask, **GREEDY)
    assert torch.equal(together[:, -5:], torch.stack(alone))


@torch.no_grad()
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_goes_on_from_a_cache(method: str) -> None:
    model, inputs = trained(method, "llama")
    tokens = inputs["input_ids"]
    whole = model(tokens).logits
    first = model(tokens[:, :3])
    rest = model(tokens[:, 3:], past_key_values=first.past_key_values, attention_mask=torch.ones(2, 5))
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, **TOLERANCE)
    with model.disable_adapter():
        bare = model(tokens[:, :3])
    with pytest.raises(AdapterError, match=r"cache of 3 positions.*filled without this adapter"):
        model(tokens[:, 3:], past_key_values=bare.past_key_values, attention_mask=torch.ones(2, 5))
    with pytest.raises(AdapterError, match="static cache"):
        model.generate(tokens, attention_mask=torch.ones(2, 5), cache_implementation="static", **GREEDY)


@torch.no_grad()
def test_last_real_token_is_pooled_whatever_the_padding() -> None:
    """A classifier on a decoder finds the last token by its id; HF PEFT makes it take the padding."""
    config = models.llama().model.config
    config.num_labels = 3
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(config).eval()
    model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=P, task_type="SEQ_CLS"))
    tokens = ids()
    padded = tokens.where(RIGHT.bool(), torch.tensor(0))
    together = model(padded, attention_mask=RIGHT, labels=torch.tensor([1, 2]))
    assert together.logits.shape == (2, 3)
    torch.testing.assert_close(together.logits[1:], model(tokens[1:, :3]).logits, **TOLERANCE)
    assert set(model.peft_config["default"].modules_to_save) == {"score"}
