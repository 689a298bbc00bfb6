"""`transformers.Trainer` as it is, accelerate, and two programs written for HF PEFT with only the import changed.

How the trainers read checkpoints of adapters is in test_training.py.
"""

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from battery import assert_base_unchanged, base_state, close, is_adapter, run, same_bits
from models import Tiny
from safetensors.torch import load_file
from test_integration import EVERY_SHAPE, attach
from torch import Tensor, nn

import trimtab
from trimtab import LoraConfig, PeftModel, get_peft_model, kernels, prepare_model_for_kbit_training

pytestmark = [
    # bitsandbytes says at each call in which precision it multiplies.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
    # HF PEFT calls transformers by old names.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning"),
]


def rows(inputs: dict[str, Tensor]) -> Any:
    """Eight examples out of a model's two inputs, with labels and a column that no model knows."""
    from datasets import Dataset

    main = next(iter(inputs.values()))
    generator = torch.Generator().manual_seed(11)
    examples = []
    for i in range(8):
        if main.is_floating_point():
            one = {"pixel_values": torch.randn(main.shape[1:], generator=generator).tolist(), "labels": i % 3}
        else:
            tokens = torch.randint(5, models.VOCABULARY, main.shape[1:], generator=generator).tolist()
            one = {"input_ids": tokens, "labels": i % 3 if "attention_mask" in inputs else tokens}
        examples.append({**one, "note": f"row {i}"})
    return Dataset.from_list(examples)


def trainer(model: Any, folder: Path, data: Any, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder),
        **{"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01, "report_to": "none",
           "use_cpu": True, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
           "disable_tqdm": True, "dataloader_pin_memory": False, **settings},
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data)


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if is_adapter(name)}


def losses(made: Any) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@EVERY_SHAPE
def test_it_trains_saves_evaluates_and_predicts(build: Callable[..., Tiny], tmp_path: Path) -> None:
    tiny = build()
    get_peft_model(tiny.model, LoraConfig(r=3, target_modules="all-linear"))
    model, data = tiny.model, rows(tiny.inputs)
    base, start = base_state(model), adapters(model)
    made = trainer(model, tmp_path, data, save_strategy="steps", save_steps=2)
    before = made.evaluate()["eval_loss"]
    made.train()
    assert made.evaluate()["eval_loss"] < before
    assert_base_unchanged(model, base)
    assert not [name for name, value in adapters(model).items() if torch.equal(value, start[name])]
    batch = next(iter(made.get_train_dataloader()))
    assert "note" not in batch
    assert {"labels", next(iter(tiny.inputs))} <= set(batch)

    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not [name for name in names if name.startswith(("model", "pytorch_model")) or name == "config.json"]
    found = made.predict(data).predictions
    predicted = torch.from_numpy(found[0] if isinstance(found, tuple) else found)
    fresh = PeftModel.from_pretrained(build().model, tmp_path / "checkpoint-4")
    again = trainer(fresh, tmp_path, data).predict(data).predictions
    close(torch.from_numpy(again[0] if isinstance(again, tuple) else again), predicted)
    made.save_model(tmp_path / "last")
    last, four = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("last", "checkpoint-4"))
    assert last.keys() == four.keys()
    assert all(torch.equal(last[name], four[name]) for name in last)


@pytest.mark.parametrize("build", [models.llama, models.gpt2], ids=["llama", "gpt2"])
def test_gradient_accumulation(build: Callable[..., Tiny], tmp_path: Path) -> None:
    """Two halves of a batch are the batch."""
    after = []
    for parts in (1, 2):
        model, inputs = attach(build())
        settings = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts, "optim": "sgd"}
        made = trainer(model, tmp_path, rows(inputs), **settings)
        made.train()
        assert made.state.global_step == 4
        after.append((losses(made), adapters(model)))
    (whole, expected), (halves, got) = after
    assert halves == pytest.approx(whole, rel=1e-4)
    for name, value in expected.items():
        close(got[name], value)


@EVERY_SHAPE
def test_gradient_checkpointing(build: Callable[..., Tiny], tmp_path: Path) -> None:
    after = []
    for settings in (
        {},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    ):
        model, inputs = attach(build())
        made = trainer(model, tmp_path, rows(inputs), optim="sgd", **settings)
        made.train()
        assert model.is_activation_checkpointing is bool(settings)
        after.append((losses(made), adapters(model)))
    (plain, expected), (checkpointed, got) = after
    assert checkpointed == pytest.approx(plain, rel=1e-4)
    for name, value in expected.items():
        close(got[name], value)


@EVERY_SHAPE
def test_bfloat16(build: Callable[..., Tiny], tmp_path: Path) -> None:
    """Mixed precision follows the float32 run within bfloat16's rounding, and what is trained stays float32."""
    runs = []
    for settings in ({}, {"bf16": True}):
        tiny = build()
        torch.manual_seed(0)
        get_peft_model(tiny.model, LoraConfig(r=3, target_modules="all-linear"))
        made = trainer(tiny.model, tmp_path, rows(tiny.inputs), **settings)
        made.train()
        assert {value.dtype for value in adapters(tiny.model).values()} == {torch.float32}
        runs.append(losses(made))
    assert runs[0][-1] < runs[0][0]
    assert runs[1] != runs[0]
    assert runs[1] == pytest.approx(runs[0], rel=0.02)
    active = run(*tiny)  # accelerate has wrapped forward by now
    close(run(copy.deepcopy(tiny.model), tiny.inputs), active)
    assert (run(tiny.model.merge_and_unload(), tiny.inputs) - active).norm() < 0.02 * active.norm()


def test_a_model_in_bfloat16(tmp_path: Path) -> None:
    tiny = models.llama()
    model = tiny.model.to(torch.bfloat16)
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    base = base_state(model)
    made = trainer(model, tmp_path, rows(tiny.inputs), max_steps=8)
    made.train()
    assert losses(made)[-1] < losses(made)[0]
    assert_base_unchanged(model, base)
    assert {value.dtype for value in adapters(model).values()} == {torch.float32}


# Quantized bases


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OPT of widths that can be quantized."""
    folder = tmp_path_factory.mktemp("opt")
    models.opt(hidden_size=64, word_embed_proj_dim=64, ffn_dim=128).model.save_pretrained(folder)
    return folder


def quantized(folder: Path, bits: int) -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 8: {"load_in_8bit": True}}[bits]
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**how), device_map="auto", dtype=torch.float32
    )


def stored(model: nn.Module) -> dict[str, Tensor]:
    """What lies in the base's parameters. Packed weights may be laid out anew at the first call, so not their order."""
    return {
        name: p.detach().clone().flatten().sort().values for name, p in model.named_parameters() if not is_adapter(name)
    }


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("bits", [4, 8])
def test_it_trains_on_a_quantized_base(bits: int, checkpointing: bool, opt: Path, tmp_path: Path) -> None:
    data = rows({"input_ids": models.ids()})
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        trainer(quantized(opt, bits), tmp_path, data)
    model = prepare_model_for_kbit_training(quantized(opt, bits), use_gradient_checkpointing=False)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"], task_type="CAUSAL_LM"))
    weight = model.model.decoder.layers[0].fc1.weight
    assert type(weight).__name__ == {4: "Params4bit", 8: "Int8Params"}[bits]
    kept = stored(model)
    settings = {"activation_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}
    made = trainer(
        model, tmp_path, data, max_steps=8, save_strategy="steps", activation_checkpointing=checkpointing, **settings
    )
    made.train()
    assert losses(made)[-1] < losses(made)[0]
    assert model.model.decoder.layers[0].fc1.weight is weight
    now = stored(model)
    assert all(same_bits(now[name], value) for name, value in kept.items() if "fc1" not in name or bits == 8)
    fresh = PeftModel.from_pretrained(quantized(opt, bits).eval(), tmp_path / "checkpoint-8")
    inputs = {"input_ids": models.ids()}
    close(run(fresh, inputs), run(model.eval(), inputs))


def test_resuming_on_a_quantized_base(opt: Path, tmp_path: Path) -> None:
    ends = []
    for start in (None, str(tmp_path / "checkpoint-2")):
        model = quantized(opt, 8)
        torch.manual_seed(0 if start is None else 1)
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.3))
        made = trainer(model, tmp_path, rows({"input_ids": models.ids()}), save_strategy="steps", save_steps=2)
        own = trimtab.Trainer(model, made.args, train_dataset=made.train_dataset)
        own.train(resume_from_checkpoint=start)
        ends.append(adapters(model))
    assert all(same_bits(ends[1][name], value) for name, value in ends[0].items())


# Programs written for HF PEFT

LIBRARIES = ("trimtab", "peft")


def start_equal(model: nn.Module) -> None:
    """The libraries draw other random numbers for A; B is zero in both."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
            if parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def eight_bit_opt(library: str, opt: Path, folder: Path) -> tuple[list[float], list[int], list[int]]:
    peft = importlib.import_module(library)
    model = quantized(opt, 8)
    # The variant of checkpointing is our default; without the argument HF PEFT leaves it to PyTorch, which warns.
    variant = {} if library == "trimtab" else {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    model = peft.prepare_model_for_kbit_training(model, **variant)
    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    model.print_trainable_parameters()
    start_equal(model)
    model.config.use_cache = False
    made = trainer(model, folder, rows({"input_ids": models.ids()}), gradient_accumulation_steps=2, max_steps=6,
                   per_device_train_batch_size=2, warmup_steps=2, learning_rate=0.05)  # fmt: skip
    made.train()
    batch = {"input_ids": models.ids()[:1], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    model.eval()
    tokens = model.generate(**batch, max_new_tokens=8, min_new_tokens=8)
    with model.disable_adapter():
        base = model.generate(**batch, max_new_tokens=8, min_new_tokens=8)
    return losses(made), tokens[0].tolist(), base[0].tolist()


def test_eight_bit_opt(
    opt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The plain formula draws dropout as HF PEFT does; the fast one draws other masks.
    monkeypatch.setattr(kernels, "fits", lambda *_: False)
    (ours, tokens, base), (theirs, expected, _) = (eight_bit_opt(library, opt, tmp_path) for library in LIBRARIES)
    said = capsys.readouterr().out.splitlines()
    counts = [line for line in said if line.startswith("trainable params")]
    assert len(counts) == 2
    assert counts[0] == counts[1]
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]
    assert tokens == expected != base


def bert_program(library: str, folder: Path, bert: Path) -> tuple[list[float], Tensor]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    peft = importlib.import_module(library)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    config = peft.LoraConfig(r=64, lora_alpha=16, target_modules=["query", "key", "value"])
    model = peft.get_peft_model(model, config)
    model.print_trainable_parameters()
    start_equal(model)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    texts = ["the film was good", "a dull room", "fine meal", "not good is bad"]
    from datasets import Dataset

    data = Dataset.from_list([{**tokenizer(text, padding="max_length", max_length=8), "text": text, "label": i % 2}
                              for i, text in enumerate(texts)])  # fmt: skip
    made = trainer(model, folder, data, max_steps=6)
    made.train()
    return losses(made), torch.from_numpy(made.predict(data).predictions)


def test_bert_with_query_key_and_value(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (ours, logits), (theirs, expected) = (bert_program(library, tmp_path, bert) for library in LIBRARIES)
    counts = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trainable params")]
    assert counts[0] == counts[1]
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
