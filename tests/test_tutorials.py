"""The programs that people start from, as they stand in tutorials but for the import line and the model's size.

Each runs with HF PEFT's import as well: what it asks for is HF PEFT's, not ours.
"""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import WORDS, review

import trimtab

pytestmark = [  # what HF PEFT's own calls set off
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter:UserWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]

CLASSIFY = """
import numpy as np
from datasets import Dataset
from {library} import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments,
)

tokenizer = AutoTokenizer.from_pretrained(checkpoint)
data = Dataset.from_dict(rows).map(lambda batch: tokenizer(batch["text"], truncation=True), batched=True)
data = data.train_test_split(0.25, seed=0)

model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
lora_config = LoraConfig(
    r=64,
    lora_alpha=16,
    target_modules=["query", "key", "value"],
    lora_dropout=0.1,
    bias="none",
    task_type=TaskType.SEQ_CLS,
)
model = get_peft_model(model, lora_config)
model.print_trainable_parameters()

def compute_metrics(eval_pred):
    logits, labels = eval_pred
    return {{"accuracy": float((np.argmax(logits, axis=-1) == labels).mean())}}

training_args = TrainingArguments(
    output_dir=output + "/checkpoints", learning_rate=5e-3, per_device_train_batch_size=4, num_train_epochs=16,
    eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=False, report_to="none", use_cpu=True,
    dataloader_pin_memory=False, disable_tqdm=True, seed=0, label_names=["labels"],
)
trainer = Trainer(
    model=model, args=training_args, train_dataset=data["train"], eval_dataset=data["test"],
    processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=compute_metrics,
)
trainer.train()
found = trainer.evaluate()["eval_accuracy"]
model.save_pretrained(output)

base = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
loaded = PeftModel.from_pretrained(base, output).eval()
inputs = tokenizer("the film was good", return_tensors="pt")
equal = (loaded(**inputs).logits - model.eval()(**inputs).logits).abs().max().item()
"""

GENERATE = """
import torch
import torch.nn as nn
import transformers
from datasets import load_dataset
from {library} import LoraConfig, get_peft_model, {prepare}
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

model = AutoModelForCausalLM.from_pretrained(
    checkpoint, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={{"": "cpu"}}
)
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = {prepare}(model)

config = LoraConfig(
    r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"
)
model = get_peft_model(model, config)
model.print_trainable_parameters()

data = load_dataset("json", data_files=quotes, cache_dir=output + "/cache")
data = data.map(lambda samples: tokenizer(samples["quote"]), batched=True)

trainer = transformers.Trainer(
    model=model,
    train_dataset=data["train"],
    args=transformers.TrainingArguments(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, warmup_steps=2, max_steps=20,
        learning_rate=2e-2, logging_steps=1, output_dir=output, report_to="none", use_cpu=True,
        dataloader_pin_memory=False, disable_tqdm=True, seed=0,
    ),
    data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
model.config.use_cache = False
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

model.config.use_cache = True
batch = tokenizer("the film", return_tensors="pt")
output_tokens = model.eval().generate(**batch, max_new_tokens=6, do_sample=False)
written = tokenizer.decode(output_tokens[0], skip_special_tokens=True)
"""


@pytest.mark.parametrize("library", ["trimtab", "peft"])
def test_bert_with_lora_and_trainer(
    library: str, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, labels = zip(*(review(i) for i in range(120)), strict=True)
    rows = {"text": texts, "label": [int(label == "praise") for label in labels]}
    names: dict[str, Any] = {"checkpoint": str(bert), "rows": rows, "output": str(tmp_path / "out")}
    torch.manual_seed(0)
    exec(CLASSIFY.format(library=library), names)
    assert type(names["lora_config"]) is (trimtab if library == "trimtab" else peft).LoraConfig
    assert names["found"] > 0.9
    assert names["equal"] < 1e-5
    trained = 2 * 3 * 64 * (64 + 64) + 64 * 2 + 2  # A and B at three layers in each of two, and the head
    assert f"trainable params: {trained:,}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny OPT with a tokenizer of words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-opt"
    words = ["<pad>", "<unk>", "</s>", *WORDS[5:]]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(words), hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=64, init_std=0.2, pad_token_id=0, bos_token_id=2, eos_token_id=2
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("library", "prepare"),
    [
        ("trimtab", "prepare_model_for_int8_training"),
        ("trimtab", "prepare_model_for_kbit_training"),
        ("peft", "prepare_model_for_kbit_training"),  # which no longer has the older name
    ],
)
def test_opt_in_8_bit_learns_quotes_and_generates(library: str, prepare: str, opt: Path, tmp_path: Path) -> None:
    quotes = tmp_path / "quotes.jsonl"
    rows = [{"quote": f"{review(i)[0]} </s>", "author": "nobody"} for i in range(0, 48, 6)]
    quotes.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    names: dict[str, Any] = {"checkpoint": str(opt), "quotes": str(quotes), "output": str(tmp_path / "out")}
    torch.manual_seed(0)
    exec(GENERATE.format(library=library, prepare=prepare), names)
    assert sum(names["losses"][-3:]) < 0.5 * sum(names["losses"][:3])
    assert names["written"].startswith("the film ")
    assert names["written"].split()[-1] in ("good", "fine")  # the quotes are all praise
