"""Packing: which rows share a block, and that a block gives what its rows give alone."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import yaml
from conftest import write_csv
from test_strategies import changed, close, saved, silent

from trimtab import LoraConfig, get_peft_model
from trimtab import recipe as recipes
from trimtab.errors import ConfigError, RecipeError
from trimtab.tasks import TASKS, Data, packing
from trimtab.training import train


def row(tokens: list[int], labels: list[int] | None = None) -> dict[str, Any]:
    return {"input_ids": tokens, "labels": labels or tokens}


def test_best_fit() -> None:
    """7, 5, 4, 3, 2 into blocks of 10: 3 fits beside 7 without a gap, 4 beside 5; 2 needs a third."""
    rows = [row([i] * i) for i in (2, 7, 3, 5, 4)]
    blocks = packing.packed(rows, 10)
    assert [block["input_ids"] for block in blocks] == [[7] * 7 + [3] * 3, [5] * 5 + [4] * 4, [2, 2]]
    assert blocks[0]["position_ids"] == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
    assert blocks[0]["labels"] == [-100, *[7] * 6, -100, 3, 3]


def test_every_row_is_in_one_block() -> None:
    draw = random.Random(0)
    rows = [row([i] * draw.randint(1, 16)) for i in range(200)]
    blocks = packing.packed(rows, 16)
    assert all(len(block["input_ids"]) <= 16 for block in blocks)
    assert len(blocks) < 1.1 * sum(len(row["input_ids"]) for row in rows) / 16
    tokens = Counter(token for block in blocks for token in block["input_ids"])
    assert tokens == Counter(token for row in rows for token in row["input_ids"])
    assert sum(block["position_ids"].count(0) for block in blocks) == 200


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    words = "the film was good bad dull fine meal room is very not".split()
    draw = random.Random(0)
    rows = [(" ".join(draw.choices(words, k=draw.randint(1, 6))), draw.choice(["yes", "no"])) for _ in range(12)]
    return write_csv(tmp_path / "rows.csv", rows, ("prompt", "answer"))


def batches(llama: Path, chats: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The task, and its rows packed and as they are, each as one batch."""
    found = []
    for given in (True, None):
        data = Data(train=chats, validation=0.25, max_length=24, packing=given)
        task, rows = TASKS["text-generation"].from_data(data, str(llama), 0, silent)
        assert task.count(rows["train"]) == 9
        found.append(task.collate(list(rows["train"])))
    return task, found[0], found[1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_loss_and_gradients_are_those_of_the_rows(llama: Path, chats: Path, attention: str) -> None:
    task, packed, plain = batches(llama, chats)
    assert len(packed["input_ids"]) < len(plain["input_ids"])
    assert "attention_mask" not in packed
    model, _ = task.load_model(str(llama), "none")
    model.set_attn_implementation(attention)
    model.config.use_cache = False  # as Trainer has it
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config).train()
    found = []
    for batch in (packed, plain):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}))
    (loss, gradients), (expected, others) = found
    torch.testing.assert_close(loss, expected)
    close(others, gradients)


def test_a_model_that_mixes_rows_is_refused() -> None:
    blocks = packing.packed([row([5, 6, 7]), row([8, 9])], 8)
    model: Any = get_peft_model(models.llama().model, LoraConfig(r=2, target_modules=["q_proj"]))
    model.config.use_cache = True  # with a cache transformers looks for no rows in positions
    with pytest.raises(ConfigError, match=r"outputs depend on the rows beside it in a block \(by \d"):
        packing.check(model, blocks)
    model.config.use_cache = False
    packing.check(model, blocks)


def write(folder: Path, llama: Path, **method: Any) -> Path:
    settings = {
        "task": "text-generation",
        "model": str(llama),
        "data": {"train": "rows.csv", "validation": 0.25, "max_length": 24, "packing": True},
        "method": method,
        "training": {"epochs": 2, "batch_size": 16, "learning_rate": 0.01, "warmup_steps": 0},
        "output": "run",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path


def test_a_packed_run_is_the_run_of_its_rows(tmp_path: Path, llama: Path, chats: Path) -> None:
    """All rows are one step, packed or not."""
    path = write(tmp_path, llama, name="lora", r=2)
    said: list[str] = []
    result = train(changed(path), lambda line: said.append(str(line)))
    assert any("train: 9 rows packed into" in line for line in said)
    assert result.metrics["rows"]["train"] == 9
    plain = train(changed(path, "data.packing=false", "output=plain"), silent)
    close(saved(plain), saved(result))
    assert result.metrics["validation"]["perplexity"] == pytest.approx(plain.metrics["validation"]["perplexity"], 1e-4)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "prompt_tuning", "num_virtual_tokens": 2},
        {"name": "prefix_tuning", "num_virtual_tokens": 2},
        {"name": "loreft"},
        {"name": "lora", "alora_invocation_tokens": [5]},
    ],
    ids=lambda method: method["name"],
)
def test_methods_that_act_on_rows_are_refused(tmp_path: Path, llama: Path, chats: Path, method: Any) -> None:
    with pytest.raises(ConfigError, match=r"data.packing: \w+Config acts on each row as a whole"):
        train(changed(write(tmp_path, llama, **method)), silent)


def test_tasks_that_do_not_pack(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.packing is of no use to text-classification"):
        recipes.read(recipe, ["data.packing=true"])
