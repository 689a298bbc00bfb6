"""The loss without logits against the model's own, and when it must not be used."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import models
import pytest
import torch
from battery import close
from models import VOCABULARY, Tiny, ids, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, Seq2SeqTrainingArguments

from trimtab import LoraConfig, causal_loss, get_peft_model
from trimtab.trainer import RunTrainer


def batch() -> dict[str, Tensor]:
    """Three rows of 7 tokens, of which some are ignored."""
    torch.manual_seed(2)
    inputs = ids(3, 7)
    labels = inputs.masked_fill(torch.rand(inputs.shape) < 0.3, -100)
    return {"input_ids": inputs, "labels": labels}


def bias_head() -> Tiny:
    made = models.llama()
    head = nn.Linear(16, VOCABULARY)
    nn.init.normal_(head.bias)
    made.model.set_output_embeddings(head)
    return made


BUILDS: dict[str, Callable[[], Tiny]] = {
    "llama": models.llama,
    "tied": lambda: models.llama(tie_word_embeddings=True),
    "bias": bias_head,
    "gpt2": models.gpt2,
    "opt": models.opt,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "trunk": {"target_modules": "all-linear"},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": r".*(q_proj|c_attn|lm_head)"},
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 tokens, so that none of these batches is one."""
    monkeypatch.setattr(causal_loss, "CHUNK", 4 * VOCABULARY)


def adapted(build: Callable[[], Tiny], **settings: Any) -> Any:
    model = get_peft_model(build().model, LoraConfig(**{"r": 2, **CONFIGS["trunk"], **settings}))
    randomise(model)
    return model.train()


def step(model: Any, given: dict[str, Any], spared: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with causal_loss.without_logits(model) if spared else nullcontext():
        loss = model(**given).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("items", [{}, {"num_items_in_batch": 31}, {"num_items_in_batch": torch.tensor(31)}], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_loss_and_gradients_are_the_model_s_own(
    build: Callable[[], Tiny], config: dict[str, Any], items: dict[str, Any]
) -> None:
    model = adapted(build, **config)
    given: dict[str, Any] = {**batch(), **items}
    expected = step(model, given)
    found = step(model, given, spared=True)
    close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        close(found[1][name], value)
    assert causal_loss.is_right(model, batch())
    assert step(model, given)[0] == expected[0]  # the model is as it was


def test_a_trained_copy_of_the_head_is_trained() -> None:
    model = adapted(models.llama, modules_to_save=["lm_head"])
    expected = step(model, batch())
    found = step(model, batch(), spared=True)
    name = next(name for name in expected[1] if "lm_head" in name)
    close(found[1][name], expected[1][name])


def test_gradients_by_finite_differences() -> None:
    """Through a head that is trained too, in float64, in chunks of 2 of 5 tokens."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(3, 7).double(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels, items = torch.tensor([0, 6, 2, 2, 5]), torch.tensor(4)

    def loss(hidden: Tensor) -> Tensor:
        return causal_loss.cross_entropy(head, hidden, labels, items, 2)

    (found,) = torch.autograd.grad(loss(hidden) * 3, hidden)
    plain = F.cross_entropy(head(hidden), labels, reduction="sum") / 4 * 3
    torch.testing.assert_close(found, torch.autograd.grad(plain, hidden)[0])
    h = hidden.detach().clone()
    h[1, 2] += 1e-3
    up = loss(h)
    h[1, 2] -= 2e-3
    assert abs((up - loss(h)).item() * 3 / 2e-3 - found[1, 2].item()) < 1e-3  # the loss is summed in float32


def test_the_logits_are_never_held() -> None:
    """They are made for 4 tokens at a time, and gone when the loss is there."""
    model = adapted(models.llama)
    made: list[tuple[tuple[int, ...], Any]] = []
    model.lm_head.register_forward_hook(lambda _, __, y: made.append((tuple(y.shape), weakref.ref(y))))
    with causal_loss.without_logits(model):
        loss = model(**batch()).loss
    assert loss.requires_grad
    learned = int((batch()["labels"][:, 1:] != -100).sum())
    sizes = [min(4, learned - start) for start in range(0, learned, 4)]
    assert [shape for shape, _ in made] == [(size, VOCABULARY) for size in sizes]
    assert not [ref for _, ref in made if ref() is not None]


def test_a_batch_without_labels_has_the_plain_loss_s_mean_of_nothing() -> None:
    model, nothing = adapted(models.llama), torch.full((2, 5), -100)
    with causal_loss.without_logits(model):
        assert model(input_ids=ids(), labels=nothing).loss.isnan()
        assert model(input_ids=ids(), labels=nothing, num_items_in_batch=3).loss == 0


def gemma2() -> Tiny:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        final_logit_softcapping=1.0,
    )  # fmt: skip
    return Tiny(Gemma2ForCausalLM(config).eval(), {})


def cohere() -> Tiny:
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2, logit_scale=0.5,
    )  # fmt: skip
    return Tiny(CohereForCausalLM(config).eval(), {})


class OwnLoss(LlamaForCausalLM):
    """Asks no `loss_function`."""

    def forward(self, labels: Any = None, **given: Any) -> Any:
        found = super().forward(**given)
        found.loss = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return found


def own_loss() -> Tiny:
    return Tiny(OwnLoss(models.llama().model.config), {})


@pytest.mark.parametrize("build", [gemma2, cohere, own_loss, models.bert])
def test_where_more_is_made_of_logits_the_plain_loss_is_taken(build: Callable[[], Tiny]) -> None:
    model = adapted(build)
    given = batch()
    if build is models.bert:  # it has no head over a vocabulary
        given = {"input_ids": given["input_ids"], "labels": torch.zeros(3, 1, dtype=torch.long)}
    assert not causal_loss.is_right(model, given)
    assert model.training
    assert not isinstance(model.get_output_embeddings(), causal_loss.Passing)


def test_an_adapter_that_acts_on_rows_gets_them_whole() -> None:
    """aLoRA at the head counts tokens from a row's end, and chunks have no rows."""
    model = adapted(models.llama, target_modules=["lm_head"], alora_invocation_tokens=[5])
    assert not causal_loss.is_right(model, batch())


def trainer(tmp_path: Any, model: Any) -> RunTrainer:
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True
    )
    return RunTrainer(tmp_path, lambda *_: {}, model=model, args=arguments)


def test_a_run_takes_it_in_training_and_not_in_evaluation(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(models.llama)
    made = trainer(tmp_path, model)
    chunks: list[int] = []
    plain = causal_loss.cross_entropy
    monkeypatch.setattr(causal_loss, "cross_entropy", lambda *given: chunks.append(given[-1]) or plain(*given))
    expected = model(**batch(), num_items_in_batch=torch.tensor(9)).loss
    found = made.compute_loss(model, dict(batch()), num_items_in_batch=torch.tensor(9))
    close(found, expected)
    assert set(chunks) == {4}
    chunks.clear()
    _, outputs = made.compute_loss(model.eval(), dict(batch()), return_outputs=True)
    assert outputs.logits.shape[-1] == VOCABULARY
    assert not chunks


def test_a_run_of_a_model_that_caps_its_logits_takes_the_plain_loss(tmp_path: Any) -> None:
    model = adapted(gemma2)
    made = trainer(tmp_path, model)
    close(made.compute_loss(model, dict(batch())), model(**batch()).loss)
