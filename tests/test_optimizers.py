"""LoRA+ and LoRA-FA: their formulas, HF PEFT's steps, plain Trainer."""

import copy
from pathlib import Path
from typing import Any

import models
import peft
import peft.optimizers.lorafa
import pytest
import torch
import transformers
from conftest import write_recipe
from models import ids
from peft.optimizers import create_lorafa_optimizer as hf_lorafa
from peft.optimizers import create_loraplus_optimizer as hf_loraplus
from safetensors.torch import load_file
from torch import nn

import trimtab
from trimtab import ConfigError, LoraConfig, PromptTuningConfig, get_peft_model
from trimtab import recipe as recipes
from trimtab.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from trimtab.training import train

SETTINGS: dict[str, Any] = {
    "r": 3, "lora_alpha": 5, "target_modules": ["query", "dense"], "rank_pattern": {"query": 2},
    "modules_to_save": ["classifier"], "bias": "lora_only",
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def silent(line: str) -> None:
    pass


def batch() -> dict[str, torch.Tensor]:
    return {**models.bert().inputs, "labels": torch.tensor([2, 0])}


def both(folder: Path, **more: Any) -> tuple[Any, Any]:
    """The same model with the same LoRA (B is not zero) in HF PEFT and here."""
    ours = get_peft_model(models.bert().model, LoraConfig(**{**SETTINGS, **more, "init_lora_weights": False}))
    ours.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(models.bert().model, str(folder), is_trainable=True).train(), ours.train()


def three_steps(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Of a loss so steep that Adam's eps, which HF PEFT's LoRA-FA adds at another place, does not show."""
    for _ in range(3):
        optimizer.zero_grad()
        (1e4 * model(**batch()).loss).backward()
        optimizer.step()


def same_files(hf: Any, ours: Any, folder: Path, before: Path) -> None:
    hf.save_pretrained(folder / "hf")
    ours.save_pretrained(folder / "ours")
    name = "adapter_model.safetensors"
    theirs, mine, old = (load_file(path / name) for path in (folder / "hf", folder / "ours", before))
    assert theirs.keys() == mine.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-5, msg=key)
    assert max((value - old[key]).abs().max() for key, value in mine.items()) > 1e-3


@pytest.mark.parametrize("more", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_loraplus_steps_as_hf_peft_does(more: dict[str, Any], tmp_path: Path) -> None:
    hf, ours = both(tmp_path, **more)
    settings: dict[str, Any] = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.1, "eps": 1e-6}
    three_steps(hf, hf_loraplus(hf, torch.optim.AdamW, **settings))
    three_steps(ours, create_loraplus_optimizer(ours, torch.optim.AdamW, **settings))
    same_files(hf, ours, tmp_path, tmp_path)


def test_loraplus_rates() -> None:
    """SGD's first step is rate times gradient: B's is `ratio` times A's, an embedding's both its own."""
    model: Any = get_peft_model(models.embeddings().model, LoraConfig(r=2, target_modules=["token", "inner"],
                                                                      init_lora_weights=False))  # fmt: skip
    before = copy.deepcopy(model)
    settings: dict[str, Any] = {"lr": 0.1, "loraplus_lr_ratio": 5.0, "loraplus_lr_embedding": 0.01}
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, **settings)
    model(ids()).square().sum().backward()
    optimizer.step()
    rates = {"inner.A": 0.1, "inner.B": 0.5, "token.A": 0.01, "token.B": 0.01}
    for name, rate in rates.items():
        site, entry = name.split(".")
        new, old = (getattr(found.get_submodule(site).adapters["default"], entry) for found in (model, before))
        torch.testing.assert_close(new, old - rate * new.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_lorafa_steps_as_hf_peft_does(more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)  # it would round the gradient
    hf, ours = both(tmp_path, **more)
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 5, "lr": 1e-3, "weight_decay": 0.1}
    three_steps(hf, hf_lorafa(hf, **settings))
    three_steps(ours, create_lorafa_optimizer(ours, **settings))
    same_files(hf, ours, tmp_path, tmp_path)
    assert not any(p.requires_grad for name, p in ours.named_parameters() if name.endswith(".A"))


def test_lorafa_is_the_nearest_change_of_the_weight() -> None:
    """Of all g_B' the one for which s g_B' A is closest to dL/dW in Frobenius norm, by least squares."""
    model: Any = get_peft_model(models.mlp().model, LoraConfig(r=2, lora_alpha=5, target_modules=["first"],
                                                               init_lora_weights=False))  # fmt: skip
    optimizer = create_lorafa_optimizer(model, 2, 5, lr=0.1)
    adapter = model.first.adapters["default"]
    model.first.weight.requires_grad_(True)
    model(**models.mlp().inputs).square().sum().backward()
    whole, own = model.first.weight.grad, adapter.B.grad.clone()
    nearest = torch.linalg.lstsq((2.5 * adapter.A).T, whole.T).solution.T
    before = adapter.B.detach().clone()
    optimizer.step()
    average = optimizer.state[adapter.B]["exp_avg"] / 0.1  # after one step a tenth of the gradient
    torch.testing.assert_close(average, nearest, rtol=1e-4, atol=1e-5)
    assert torch.equal(adapter.B.grad, own)
    assert not torch.equal(adapter.B, before)


def test_plain_trainer_takes_them(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": row.tolist(), "labels": i % 3} for i, row in enumerate(ids(8))])
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=3, report_to="none", use_cpu=True,
                                               learning_rate=1e-2, save_strategy="no", disable_tqdm=True,
                                               dataloader_pin_memory=False)  # fmt: skip
    for make in (
        lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0),
        lambda model: create_lorafa_optimizer(model, 2, 4, lr=1e-2),
    ):
        model: Any = get_peft_model(models.bert().model, LoraConfig(r=2, lora_alpha=4, task_type="SEQ_CLS"))
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = make(model)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
        trainer.train()
        assert {name for name, p in model.named_parameters() if not torch.equal(p, start[name])} == trained
        assert isinstance(trainer.lr_scheduler.get_last_lr(), list)


def test_a_recipe_asks_for_loraplus(tmp_path: Path, bert: Path) -> None:
    """With a ratio of 1 it is AdamW to the bit; with another not; where nothing is B, an error."""
    path = write_recipe(tmp_path, bert)
    file = "adapter_model.safetensors"
    found = {}
    for ratio in (None, 1.0, 8.0):
        changes = ["training.epochs=1", *([f"training.loraplus_lr_ratio={ratio}"] if ratio else [])]
        folder = train(recipes.read(path, changes), silent).folder
        found[ratio] = load_file(folder / file)
        assert recipes.read(folder / "recipe.yaml").training.get("loraplus_lr_ratio") == ratio
    assert all(torch.equal(value, found[1.0][key]) for key, value in found[None].items())
    assert not all(torch.equal(value, found[8.0][key]) for key, value in found[None].items())
    with pytest.raises(trimtab.RecipeError, match="loraplus_lr_ratio: Input should be greater than 0"):
        recipes.read(path, ["training.loraplus_lr_ratio=0.0"])
    with pytest.raises(ConfigError, match="no such B trains"):
        train(recipes.read(path, ["method={name: bitfit}", "training.loraplus_lr_ratio=4.0"]), silent)


def test_refuses_what_means_nothing() -> None:
    prompted = get_peft_model(models.gpt2().model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    plus: dict[str, Any] = {"lr": 1e-3, "loraplus_lr_ratio": 4.0}
    with pytest.raises(ConfigError, match="no such B"):
        create_loraplus_optimizer(prompted, torch.optim.AdamW, **plus)
    with pytest.raises(ConfigError, match="none trains here"):
        create_lorafa_optimizer(prompted, 8, 8, lr=1e-3)

    def lora(make: Any = models.mlp, **settings: Any) -> nn.Module:
        return get_peft_model(make().model, LoraConfig(**{"target_modules": ["first"], "r": 2, **settings}))

    with pytest.raises(ConfigError, match="loraplus_weight_decay instead"):
        create_loraplus_optimizer(lora(), torch.optim.AdamW, **plus, weight_decay=0.1)
    with pytest.raises(ConfigError, match="r=3, but the adapter has 2"):
        create_lorafa_optimizer(lora(), 3, 8, lr=1e-3)
    with pytest.raises(ConfigError, match="use_rslora=True, but the adapter has False"):
        create_lorafa_optimizer(lora(), 2, 8, lr=1e-3, use_rslora=True)
    for model in (lora(use_dora=True), lora(models.embeddings, target_modules=["token"])):
        with pytest.raises(ConfigError, match="plain product B A"):
            create_lorafa_optimizer(model, 2, 8, lr=1e-3)
