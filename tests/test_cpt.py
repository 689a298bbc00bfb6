"""CPT: its formula, and HF PEFT's loss, training and results."""

from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from models import ids, randomise
from test_virtual_tokens import GREEDY, LEFT, MODELS, TOLERANCE, tokenwise
from torch import Tensor, nn

from trimtab import ConfigError, CPTConfig, PeftModel, get_peft_model, sites

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]

# Two examples, each with input format, input, output format and label; a token of no type between them.
CONTEXT = [11, 12, 13, 14, 15, 9, 21, 22, 23, 24]
TYPES = [1, 2, 2, 3, 4, 0, 5, 6, 7, 8]
ROWS = torch.tensor([[1, 2, 3, 4, 4], [0, 1, 2, 3, 4]])
SETTINGS: dict[str, Any] = {
    "cpt_token_ids": CONTEXT, "cpt_tokens_type_mask": TYPES, "cpt_mask": [1] * 10, "task_type": "CAUSAL_LM",
    "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.7,
    "opt_projection_epsilon": 15, "opt_projection_format_epsilon": 0.8,
}  # fmt: skip


def batch(**more: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids(), "attention_mask": LEFT, "labels": tokenwise(), **more}


@pytest.mark.parametrize("types", [None, ROWS], ids=["all-labels", "typed"])
@pytest.mark.parametrize("kind", ["none", "decay"])
def test_loss_by_the_formula(kind: str, types: Tensor | None) -> None:
    settings = {**SETTINGS, "opt_weighted_loss_type": kind, "opt_loss_decay_factor": 0.7 if kind == "decay" else 1.0}
    model: Any = get_peft_model(models.llama().model, CPTConfig(**settings))
    randomise(model)
    inputs = batch() if types is None else batch(input_type_mask=types)
    got = model(**inputs)
    assert got.logits.shape[:2] == (2, 5)
    base = models.llama().model
    own = sites.adapters(model)["default"].embedding
    embeds = torch.cat([own.expand(2, -1, -1), base.get_input_embeddings()(inputs["input_ids"])], 1)
    mask = torch.cat([torch.ones(2, 10).long(), LEFT], 1)
    logits = base(inputs_embeds=embeds, attention_mask=mask).logits.log_softmax(-1)
    terms = []
    for row in range(2):
        given = [4] * 5 if types is None else types[row].tolist()
        kinds = TYPES + [found + 8 if found else 0 for found in given]
        tokens = CONTEXT + inputs["labels"][row].tolist()
        gamma = {4: 0.7**2, 8: 0.7, 12: 1.0} if kind == "decay" else {4: 1.0, 8: 1.0, 12: 1.0}
        for place in range(1, 15):
            if kinds[place] in gamma and tokens[place] != -100:
                terms.append(-gamma[kinds[place]] * logits[row, place - 1, tokens[place]])
    torch.testing.assert_close(got.loss, torch.stack(terms).mean(), **TOLERANCE)
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], got.loss, **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_trains_as_hf_peft_does(name: str, tmp_path: Path) -> None:
    """Five steps, in which some rows reach the edge of their balls; then both ways through a file."""
    make = MODELS[name][0]
    hf = peft.get_peft_model(make().model, peft.CPTConfig(**SETTINGS)).train()
    ours: Any = get_peft_model(make().model, CPTConfig(**SETTINGS)).train()
    steps = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1) for model in (hf, ours)]
    for _ in range(5):
        for model, optimizer in zip((hf, ours), steps, strict=True):
            optimizer.zero_grad()
            model(**batch(input_type_mask=ROWS.clone())).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
    hf.eval(), ours.eval()
    change = sites.adapters(ours)["default"].embedding - ours.get_input_embeddings()(torch.tensor(CONTEXT))
    radius = {1: 0.8, 2: 15, 3: 0.8, 0: 0.0}
    reach = torch.tensor([radius[found % 4] for found in TYPES]) * (16 / 2048) ** 0.5
    length = change.norm(dim=1)
    assert (length <= reach + 1e-6).all()
    learned = reach > 0
    assert (length[learned] > 0).all()
    assert torch.isclose(length[learned], reach[learned]).any()
    assert (length[learned] < 0.9 * reach[learned]).any()
    inputs = batch(input_type_mask=ROWS)
    with torch.no_grad():
        theirs, mine = hf(**batch(input_type_mask=ROWS.clone())), ours(**inputs)
        torch.testing.assert_close((mine.logits, mine.loss), (theirs.logits[:, 10:], theirs.loss), **TOLERANCE)
        hf.save_pretrained(tmp_path / "hf")
        ours.save_pretrained(tmp_path / "ours")
        read = PeftModel.from_pretrained(make().model, tmp_path / "hf", is_trainable=True)
        assert torch.equal(sites.adapters(read)["default"].context, sites.adapters(ours)["default"].context)
        torch.testing.assert_close(read(**inputs).logits, mine.logits, **TOLERANCE)
        again = peft.PeftModel.from_pretrained(make().model, str(tmp_path / "ours")).eval()
        found = again(**batch(input_type_mask=ROWS.clone()))
        torch.testing.assert_close((found.logits[:, 10:], found.loss), (mine.logits, mine.loss), **TOLERANCE)
        call = {"input_ids": ids(), "attention_mask": torch.ones(2, 5).long()}
        expected = again.generate(**call, **GREEDY)
        for cache in (True, False):
            assert torch.equal(ours.generate(**call, **GREEDY, use_cache=cache), expected)


def test_types_count_on_from_the_last_whole_example() -> None:
    """A context that ends in an input format: the rows' labels are labels still (HF PEFT's loss is not a number)."""
    short = {**SETTINGS, "cpt_token_ids": [11, 12], "cpt_tokens_type_mask": [1, 1], "cpt_mask": None}
    model: Any = get_peft_model(models.llama().model, CPTConfig(**short))
    inputs = batch()
    logits = model(**inputs).logits[:, :-1].log_softmax(-1)
    targets = inputs["labels"][:, 1:]
    first = get_peft_model(models.llama().model, CPTConfig(**short))
    assert torch.isfinite(first(**inputs).loss)
    counted = targets != -100
    inner = -logits.gather(2, targets.clamp(min=0)[..., None])[..., 0][counted]
    # The first label is predicted by the last virtual token, whose logits are cut off: leave it out.
    rest = {**inputs, "labels": torch.cat([torch.full((2, 1), -100), targets], 1)}
    torch.testing.assert_close(model(**rest).loss, inner.mean(), **TOLERANCE)


def test_accumulated_batches_make_the_mean_of_all() -> None:
    """As Trainer counts: `num_items_in_batch` is the number of the rows' labels in all batches of the step."""
    model: Any = get_peft_model(models.llama().model, CPTConfig(**SETTINGS))
    inputs = batch()
    items = torch.tensor(2 * int((inputs["labels"][:, 1:] != -100).sum()))
    whole = model(**inputs).loss
    torch.testing.assert_close(sum(model(**inputs, num_items_in_batch=items).loss for _ in range(2)), whole)


def test_a_classifier_keeps_its_own_loss() -> None:
    config = CPTConfig(cpt_token_ids=[7, 8], cpt_tokens_type_mask=[2, 4], task_type="SEQ_CLS")
    model: Any = get_peft_model(models.bert().model, config)
    inputs = {**models.bert().inputs, "labels": torch.tensor([2, 0])}
    result = model(**inputs)
    torch.testing.assert_close(result.loss, nn.functional.cross_entropy(result.logits, inputs["labels"]))
    result.loss.backward()
    gradient = model.bert.adapters["default"].embedding.grad
    assert gradient[0].norm() > 0
    assert gradient[1].norm() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cpt_token_ids": None}, "give cpt_token_ids"),
        ({"cpt_token_ids": [64]}, "ids below 64"),
        ({"num_virtual_tokens": 3}, "num_virtual_tokens=3: .* it is 2"),
        ({"cpt_mask": [1, 0]}, "a 1 for each"),
        ({"cpt_tokens_type_mask": [1]}, "each of the 2 tokens"),
        ({"cpt_tokens_type_mask": [1, -1]}, "from 0 on"),
        ({"opt_loss_decay_factor": 0.5}, "needs opt_weighted_loss_type='decay'"),
        ({"opt_weighted_loss_type": "decay", "task_type": None}, "task_type='CAUSAL_LM'"),
    ],
)
def test_refuses_what_means_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(
            models.gpt2().model, CPTConfig(**{"cpt_token_ids": [7, 8], "task_type": "CAUSAL_LM", **settings})
        )
