"""Fixtures for whole runs: a tiny BERT with its tokenizer, tiny reviews, a recipe. Nothing is downloaded."""

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a the film meal room was is very not good bad dull fine".split()


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for test_triton.py; who imports Triton first is not for us to say
torch.set_num_threads(1)  # on models this small threads only wait for each other, minutes long on a busy machine


@pytest.fixture(scope="session", autouse=True)
def _fast_forms() -> None:
    """Tiny models are too small for them, so that they would be tried nowhere. (test_kernels.py has the plain ones.)"""
    from trimtab import kernels

    kernels.FEW = 0


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    from trimtab.cli.quiet import quiet

    quiet()


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny BERT without a classification head."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=64,  # quantization wants multiples of 64
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,  # the usual 0.02 leaves so small a model nothing to work with
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=32).save_pretrained(folder)
    return folder


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{% if m['role'] == 'assistant' %} <end>{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama with a chat template; the token that pads is the one that ends an answer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    words = ["<unk>", "<s>", "<end>", "<user>", "<assistant>", "<system>", *WORDS[5:], "yes", "no", "and", "?"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<end>", "pad_token": "<end>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, model_max_length=64, **special)
    made.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def trimtab(*arguments: object) -> int:
    """Run a command line in this process; its exit code."""
    from trimtab.cli import main

    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def review(i: int) -> tuple[str, str]:
    """The i-th of an endless series of reviews, and its class."""
    good = i % 2 == 0
    word = ("good", "fine")[i % 3 % 2] if good else ("bad", "dull")[i % 3 % 2]
    return f"the {('film', 'meal', 'room')[i % 3]} {('was', 'is')[i % 5 % 2]} {word}", "praise" if good else "blame"


def write_csv(path: Path, rows: list[tuple[Any, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_recipe(folder: Path, model: Path) -> Path:
    """A recipe and its data in `folder`; a run of it takes a second."""
    write_csv(folder / "train.csv", [review(i) for i in range(24)])
    write_csv(folder / "test.csv", [review(i) for i in range(24, 32)])
    settings = {
        "task": "text-classification",
        "model": str(model),
        "data": {"train": "train.csv", "validation": 0.25, "test": "test.csv"},
        "method": {"name": "lora", "r": 2, "target_modules": ["query", "value"]},
        "training": {"epochs": 2, "batch_size": 6, "learning_rate": 0.01},
        "output": "run",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path: Path, bert: Path) -> Path:
    return write_recipe(tmp_path, bert)
