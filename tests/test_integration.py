"""Whatever runs a model runs one with adapters: generation, pipelines, compiling, checkpointing, copies, hooks."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from battery import close, far, is_adapter, loss, run, same_bits
from models import Tiny, output, randomise
from torch import Tensor, nn

from trimtab import AdapterError, LoraConfig, PeftModel, get_peft_model

SHAPES = {name: models.TRANSFORMERS[name] for name in ("llama", "bert", "t5", "vit", "gpt2")}
EVERY_SHAPE = pytest.mark.parametrize("build", SHAPES.values(), ids=SHAPES)
GENERATORS = pytest.mark.parametrize("build", [models.llama, models.gpt2, models.t5], ids=["llama", "gpt2", "t5"])


def attach(tiny: Tiny, targets: Any = "all-linear", seed: int = 1, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(seed)
    get_peft_model(tiny.model, LoraConfig(r=2, lora_alpha=5, target_modules=targets, **settings))
    randomise(tiny.model, seed)
    return tiny


def second(model: Any) -> None:
    """One more adapter that computes something else, not active yet."""
    model.add_adapter("second", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model, inputs).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    assert all(is_adapter(name) for name in found)
    return found


def all_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """In 1e-5 of the largest: sums of many terms round by their terms, not by their result."""
    assert got.keys() == expected.keys()
    size = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5 * max(size, 1))


@EVERY_SHAPE
def test_a_fresh_adapter_changes_no_bit(build: Callable[..., Tiny]) -> None:
    """Of anything that the model returns, caches included."""
    model, inputs = build(attn_implementation="eager")
    wanted = {**inputs, "output_hidden_states": True, "output_attentions": True}
    wanted |= {} if build in (models.bert, models.vit) else {"use_cache": True}
    with torch.no_grad():
        before = tensors(model(**wanted))
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        after = tensors(model(**wanted))
    assert len(before) == len(after) > 4
    assert all(same_bits(a, b) for a, b in zip(after, before, strict=True))


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if result is None or isinstance(result, int | float):
        return []
    if isinstance(result, dict):
        return tensors(tuple(result.values()))
    if not isinstance(result, tuple | list):  # a cache
        return tensors(list(result))
    return [tensor for part in result for tensor in tensors(part)]


# Generation

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 3},
}


@torch.no_grad()
def generated(model: Any, **settings: Any) -> Tensor:
    torch.manual_seed(4)
    return model.generate(max_new_tokens=6, min_new_tokens=6, **settings)


@pytest.mark.parametrize("way", WAYS)
@GENERATORS
def test_generating_equals_the_merged_model(build: Callable[..., Tiny], way: str) -> None:
    model, inputs = attach(build())
    ids = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"]), **WAYS[way]}
    ids |= {"pad_token_id": 0}
    tokens = generated(model, **ids)
    assert torch.equal(generated(model, **ids, use_cache=False), tokens)
    with model.disable_adapter():
        assert not torch.equal(generated(model, **ids), tokens)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert torch.equal(generated(merged, **ids), tokens)


@pytest.mark.parametrize("build", [models.llama, models.gpt2], ids=["llama", "gpt2"])
def test_generating_for_rows_padded_on_the_left(build: Callable[..., Tiny]) -> None:
    model, inputs = attach(build())
    rows = inputs["input_ids"]
    alone = [generated(model, input_ids=row[None], attention_mask=torch.ones_like(row[None]), pad_token_id=0)
             for row in (rows[0], rows[1, 2:])]  # fmt: skip
    padded, mask = rows.clone(), torch.ones_like(rows)
    padded[1, :2] = mask[1, :2] = 0
    together = generated(model, input_ids=padded, attention_mask=mask, pad_token_id=0)
    assert torch.equal(together[0], alone[0][0])
    assert torch.equal(together[1, 2:], alone[1][0])


# Pipelines


def test_pipeline_for_text_generation() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {f"w{i}": i for i in range(models.VOCABULARY)}
    words["[UNK]"] = words.pop("w3")
    tokenizer: Any = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="w0", eos_token="w2")
    model, _ = attach(models.llama())
    ask = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_full_text": False}
    run_it = pipeline("text-generation", model=model, tokenizer=made)
    (answer,) = run_it("w7 w9 w11", **ask)
    prompt = torch.tensor([[7, 9, 11]])
    merged = copy.deepcopy(model).merge_and_unload()
    expected = merged.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, min_new_tokens=5)
    assert answer["generated_text"].split() == [f"w{i}" for i in expected[0, 3:].tolist()]
    with model.disable_adapter():
        assert run_it("w7 w9 w11", **ask) != [answer]


def test_pipeline_for_text_classification(bert: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    attach(Tiny(model, {}), ["query", "value"], task_type="SEQ_CLS")
    texts = ["the film was good", "a dull room"]
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    answers = classify(texts)
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        expected = merged(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
    for answer, row in zip(answers, expected, strict=True):
        assert {each["label"]: each["score"] for each in answer} == pytest.approx(
            {f"LABEL_{i}": value for i, value in enumerate(row.tolist())}, abs=1e-5
        )
    with model.disable_adapter():
        assert abs(classify(texts)[0][0]["score"] - answers[0][0]["score"]) > 1e-3


def test_pipeline_for_image_classification() -> None:
    from PIL import Image
    from transformers import ViTImageProcessorPil, pipeline

    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    pixels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    model, _ = attach(models.vit())
    answer = pipeline("image-classification", model=model, image_processor=processor)(image)
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        expected = merged(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    scores = {each["label"]: each["score"] for each in answer}
    assert scores == pytest.approx({f"LABEL_{i}": value for i, value in enumerate(expected.tolist())}, abs=1e-5)


# Gradient checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@EVERY_SHAPE
def test_checkpointing_changes_no_gradient(build: Callable[..., Tiny], reentrant: bool) -> None:
    model, inputs = attach(build())
    model.train()
    ends = ("down_proj", "intermediate.dense", "fc2", "c_fc", "wo")
    site = next(module for name, module in model.named_modules() if name.endswith(ends))
    calls: list[int] = []
    site.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = gradients(model, inputs)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # this variant differentiates only where an input wants a gradient
    all_close(gradients(model, inputs), expected)
    assert len(calls) == 1 + 2  # with checkpointing once more, while going back
    model.activation_checkpointing_disable()
    all_close(gradients(model, inputs), expected)
    assert len(calls) == 4


# Copies, precisions, state


@EVERY_SHAPE
def test_a_copy_is_its_own_model(build: Callable[..., Tiny]) -> None:
    model, inputs = attach(build())
    active = run(model, inputs)
    copied = copy.deepcopy(model)
    assert same_bits(run(copied, inputs), active)
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
    merged = copied.merge_and_unload()
    close(run(merged, inputs), active)
    assert same_bits(run(model, inputs), active)


FRESH = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    made = pickle.load(file)
found = {}
for name, (model, inputs) in made.items():
    with torch.no_grad():
        found[name] = [tensor.clone() for tensor in (model(**inputs)[0], model.unload()(**inputs)[0])]
    assert not hasattr(model, "peft_config")
torch.save(found, sys.argv[2])
"""


def test_pickles_are_read_by_a_fresh_process(tmp_path: Path) -> None:
    made = {name: attach(build()) for name, build in SHAPES.items()}
    expected = {name: (run(*tiny), run(*SHAPES[name]())) for name, tiny in made.items()}
    (tmp_path / "models.pickle").write_bytes(pickle.dumps({name: tuple(tiny) for name, tiny in made.items()}))
    python = [sys.executable, "-c", FRESH, str(tmp_path / "models.pickle"), str(tmp_path / "found")]
    subprocess.run(python, check=True)
    for name, both in torch.load(tmp_path / "found").items():
        for got, wanted in zip(both, expected[name], strict=True):
            close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY_SHAPE
def test_precisions(build: Callable[..., Tiny], dtype: torch.dtype) -> None:
    """In half precision the adapter goes along; back in float32 it is what rounding left of it."""
    model, inputs = attach(build())
    active = run(model, inputs)
    rounded = {name: value.to(dtype).float() for name, value in model.state_dict().items()}
    half = model.to(dtype) if dtype is torch.bfloat16 else model.half()
    assert {p.dtype for p in half.parameters()} == {dtype}
    low = run(half, {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()})
    assert low.dtype is dtype
    assert (low.float() - active).norm() < 0.1 * active.norm()
    again = half.float()
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert all(torch.equal(value, rounded[name]) for name, value in again.state_dict().items())
    close(run(copy.deepcopy(again).merge_and_unload(), inputs), run(again, inputs))


@EVERY_SHAPE
def test_the_state_dict_saves_and_loads(build: Callable[..., Tiny], tmp_path: Path) -> None:
    model, inputs = attach(build())
    torch.save(model.state_dict(), tmp_path / "state")
    other, _ = attach(build(), seed=8)
    far(run(other, inputs), run(model, inputs))
    assert other.load_state_dict(torch.load(tmp_path / "state", weights_only=True)).missing_keys == []
    assert same_bits(run(other, inputs), run(model, inputs))
    assert set(build().model.state_dict()) == {name for name in model.state_dict() if not is_adapter(name)}


# What PyTorch does to a model from outside


@EVERY_SHAPE
def test_functional_call(build: Callable[..., Tiny]) -> None:
    model, inputs = attach(build())
    other, _ = attach(build(), seed=8)
    adapters = {name: p.detach() for name, p in other.named_parameters() if is_adapter(name)}
    before = run(model, inputs)

    def value(given: dict[str, Tensor]) -> Tensor:
        class Call(nn.Module):
            def forward(self, **kwargs: Any) -> Any:
                return torch.func.functional_call(model, given, kwargs=kwargs)

        return loss(Call(), inputs)

    close(value(adapters), loss(other, inputs))
    all_close(torch.func.grad(value)(adapters), gradients(other, inputs))
    assert same_bits(run(model, inputs), before)


@EVERY_SHAPE
def test_autocast(build: Callable[..., Tiny]) -> None:
    """It computes in bfloat16, to which 8 bits of a mantissa belong; weights and their gradients stay float32."""
    model, inputs = attach(build())
    expected = gradients(model, inputs)
    active = run(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        low = run(model, inputs)
        model.zero_grad()
        loss(model, inputs).backward()
    assert not same_bits(low.float(), active)
    assert (low.float() - active).norm() < 0.1 * active.norm()
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            assert parameter.dtype is parameter.grad.dtype is torch.float32
    flat = [torch.cat([found[name].flatten() for name in expected])
            for found in (expected, {name: p.grad for name, p in model.named_parameters()})]  # fmt: skip
    assert torch.cosine_similarity(*flat, dim=0) > 0.99


@EVERY_SHAPE
def test_inference_mode(build: Callable[..., Tiny]) -> None:
    model, inputs = attach(build())
    active, expected = run(model, inputs), gradients(model, inputs)
    with torch.inference_mode():
        result = output(model, inputs)
    assert result.is_inference()
    assert same_bits(result.clone(), active)
    all_close(gradients(model, inputs), expected)  # nothing of it stuck to the model


# transformers has methods for adapters of HF PEFT; on a model with ours they would do nothing, or not what they say


def test_all_methods_of_transformers_for_adapters_are_ours() -> None:
    from transformers.integrations.peft import PeftAdapterMixin

    model, _ = attach(models.llama())
    theirs = {name for name, value in vars(PeftAdapterMixin).items() if callable(value) and not name.startswith("_")}
    assert {name for name in theirs if name not in vars(PeftModel)} == {"enable_peft_hotswap"}
    with pytest.raises(RuntimeError, match="before loading the first adapter"):
        model.enable_peft_hotswap()


@EVERY_SHAPE
def test_disabling_and_enabling_adapters(build: Callable[..., Tiny]) -> None:
    model, inputs = attach(build())
    active, base = run(model, inputs), run(*build())
    second(model)
    model.set_adapter(["default", "second"])
    both = run(model, inputs)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):  # a second time changes nothing
        model.disable_adapters()
        assert same_bits(run(model, inputs), base)
        assert not any(p.requires_grad for p in model.parameters())
    for _ in range(2):
        model.enable_adapters()
        assert same_bits(run(model, inputs), both)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    model.disable_adapters()
    model.delete_adapter("second")
    model.enable_adapters()
    assert same_bits(run(model, inputs), active)
    model.disable_adapters()
    model.set_adapter("default")
    model.enable_adapters()
    assert model.active_adapters == ["default"]
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged"):
        model.disable_adapters()
    close(run(model, inputs), active)


def test_the_state_of_an_adapter_is_what_is_saved(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, _ = attach(models.bert(), ["query"], task_type="SEQ_CLS")
    second(model)
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        saved = load_file(folder / "adapter_model.safetensors")
        state = model.get_adapter_state_dict(name)
        assert {f"base_model.model.{key}" for key in state} == set(saved)
        assert all(same_bits(value, saved[f"base_model.model.{key}"]) for key, value in state.items())
    assert model.get_adapter_state_dict().keys() == model.get_adapter_state_dict("default").keys()
    with pytest.raises(AdapterError, match=r"'secnd'.*Did you mean 'second'"):
        model.get_adapter_state_dict("secnd")
