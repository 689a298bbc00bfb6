"""Mixed batches: each row comes to what it comes to alone, under its own adapter."""

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from battery import close, far
from models import Tiny, output, randomise
from torch import Tensor

from trimtab import (
    AdapterError,
    AdaptionPromptConfig,
    BitFitConfig,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    UnionConfig,
    UniPeltConfig,
    VeraConfig,
    get_peft_model,
    kernels,
)

BASE = "__base__"


def with_adapters(tiny: Tiny, configs: dict[str, PeftConfig]) -> Any:
    """The model with these adapters, each shifted at random."""
    model: Any = tiny.model
    for number, (name, config) in enumerate(configs.items()):
        if number == 0:
            get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
    randomise(model)
    return model


def loras(number: int, targets: list[str]) -> dict[str, PeftConfig]:
    """LoRAs of different ranks, scales and targets, and some with other parts."""
    found: dict[str, PeftConfig] = {}
    for i in range(number):
        more: dict[str, Any] = {"use_dora": True} if i % 5 == 3 else {"use_rslora": i % 2 == 0}
        own = targets if i % 3 else targets[:1]
        found[f"n{i}"] = LoraConfig(r=1 + i % 6, lora_alpha=1 + i % 4, target_modules=own, **more)
    return found


def alone(model: Any, name: str, inputs: dict[str, Tensor]) -> Tensor:
    if name == BASE:
        with model.disable_adapter():
            return output(model, inputs)
    model.set_adapter(name)
    return output(model, inputs)


def rows(tiny: Tiny, number: int) -> dict[str, Tensor]:
    """Other tokens in every row; where there is a mask rows of different lengths."""
    inputs = {"input_ids": models.ids(number)}
    if "attention_mask" in tiny.inputs:
        inputs["attention_mask"] = (torch.arange(5) < torch.arange(number)[:, None] % 3 + 3).long()
    return inputs


def assert_rows_as_alone(model: Any, names: list[str], inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        mixed = output(model, {**inputs, "adapter_names": names})
        for i, name in enumerate(names):
            one = {key: value[i : i + 1] for key, value in inputs.items()}
            own = alone(model, name, one)
            close(mixed[i : i + 1], own)
            if name != BASE:
                far(own, alone(model, BASE, one))


@pytest.mark.parametrize("number", [1, 2, 7, 64])
def test_any_number_of_loras(number: int) -> None:
    tiny = models.llama()
    model = with_adapters(tiny, loras(number, ["q_proj", "v_proj", "down_proj"]))
    names = [f"n{i}" for i in torch.randperm(number, generator=torch.Generator().manual_seed(0)).tolist()]
    names = [*names, BASE, *names[: number // 2]]
    assert_rows_as_alone(model, names, rows(tiny, len(names)))


MIXED: list[tuple[Callable[[], Tiny], dict[str, PeftConfig]]] = [
    (
        models.gpt2,
        {
            "lora": LoraConfig(r=3, target_modules=["c_attn"]),
            "dora": LoraConfig(r=2, target_modules=["c_attn", "c_proj"], use_dora=True),
            "ia3": IA3Config(target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"]),
            "bottleneck": BottleneckConfig(reduction_factor=4),
            "bitfit": BitFitConfig(),
            "vera": VeraConfig(r=4, target_modules=["c_attn"]),
            "prompt-3": PromptTuningConfig(num_virtual_tokens=3),
            "prompt-5": PromptTuningConfig(num_virtual_tokens=5),
            "p-tuning": PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=7),
            "prefix-4": PrefixTuningConfig(num_virtual_tokens=4),
            "prefix-1": PrefixTuningConfig(num_virtual_tokens=1),
            "llama-adapter": AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
        },
    ),
    (
        models.llama,
        {
            "lora": LoraConfig(r=3, target_modules="all-linear"),
            "prompt": PromptTuningConfig(num_virtual_tokens=3),
            "prefix": PrefixTuningConfig(num_virtual_tokens=4),
            "llama-adapter": AdaptionPromptConfig(adapter_len=3),
        },
    ),
    (
        models.opt,
        {
            "lora": LoraConfig(r=3, target_modules="all-linear"),
            "prompt": PromptTuningConfig(num_virtual_tokens=3),
            "prefix": PrefixTuningConfig(num_virtual_tokens=4),
            "houlsby": BottleneckConfig(variant="houlsby", reduction_factor=4),
        },
    ),
    (
        models.gpt2,
        {
            "unipelt-2": UniPeltConfig(num_virtual_tokens=2, r=2, reduction_factor=4),
            "unipelt-5": UniPeltConfig(num_virtual_tokens=5, r=3, reduction_factor=2),
            "prefix": PrefixTuningConfig(num_virtual_tokens=3),
            "lora": LoraConfig(r=3, target_modules=["c_attn"]),
            "gated": UnionConfig(gated=True, methods=[LoraConfig(r=2, target_modules=["c_attn"])]),
        },
    ),
    (
        models.bert,
        {
            "lora": LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS"),
            "head": BitFitConfig(task_type="SEQ_CLS"),
            "prompt-3": PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
            "prompt-1": PromptTuningConfig(num_virtual_tokens=1, task_type="SEQ_CLS"),
            "prefix-2": PrefixTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"),
            "prefix-5": PrefixTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS"),
        },
    ),
]


@pytest.mark.parametrize(("tiny", "configs"), MIXED, ids=[tiny.__name__ for tiny, _ in MIXED])
def test_methods_of_all_kinds_in_one_batch(tiny: Callable[[], Tiny], configs: dict[str, PeftConfig]) -> None:
    made = tiny()
    model = with_adapters(made, configs)
    names = [*configs, BASE, *reversed(configs)]
    assert_rows_as_alone(model, names, rows(made, len(names)))


def test_an_encoder_decoder() -> None:
    tiny = models.t5()
    model = with_adapters(tiny, {
        "lora": LoraConfig(r=3, target_modules=["q", "v"]),
        "prompt-3": PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"),
        "prompt-1": PromptTuningConfig(num_virtual_tokens=1, task_type="SEQ_2_SEQ_LM"),
        "prefix-2": PrefixTuningConfig(num_virtual_tokens=2, task_type="SEQ_2_SEQ_LM"),
        "prefix-5": PrefixTuningConfig(num_virtual_tokens=5, task_type="SEQ_2_SEQ_LM"),
    })  # fmt: skip
    names = ["prefix-5", "lora", "prompt-1", BASE, "prompt-3", "prefix-2"]
    inputs = {"input_ids": models.ids(6), "decoder_input_ids": models.ids(6, 4)}
    assert_rows_as_alone(model, names, inputs)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    mixed = model.generate(input_ids=inputs["input_ids"], adapter_names=names, **settings)
    for i, name in enumerate(names):
        if name != BASE:
            model.set_adapter(name)
            own = model.generate(input_ids=inputs["input_ids"][i : i + 1], **settings)
            assert mixed[i].tolist() == own[0].tolist(), name


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("tiny", "configs"), MIXED[:4], ids=[tiny.__name__ for tiny, _ in MIXED[:4]])
def test_generation_token_for_token(tiny: Callable[[], Tiny], configs: dict[str, PeftConfig], beams: int) -> None:
    model = with_adapters(tiny(), configs)
    names = [*configs, BASE, next(iter(configs))]
    inputs = models.ids(len(names))
    mask = torch.ones_like(inputs)
    mask[::2, 0] = 0  # left padding
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    mixed = model.generate(input_ids=inputs, attention_mask=mask, adapter_names=names, **settings)
    texts = set()
    for i, name in enumerate(names):
        one = {"input_ids": inputs[i : i + 1], "attention_mask": mask[i : i + 1]}
        if name == BASE:
            with model.disable_adapter():
                own = model.generate(**one, **settings)[0].tolist()
        else:
            model.set_adapter(name)
            own = model.generate(**one, **settings)[0].tolist()
        got = mixed[i].tolist()
        assert got[: len(own)] == own, name
        assert set(got[len(own) :]) <= {0}, name
        texts.add(tuple(own[5:]))
    assert len(texts) > 2  # or it would mean little


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("tiny", "configs"), MIXED, ids=[tiny.__name__ for tiny, _ in MIXED])
def test_gradients_are_those_of_each_adapter_alone(
    tiny: Callable[[], Tiny], configs: dict[str, PeftConfig], checkpointed: bool
) -> None:
    made = tiny()
    if checkpointed:
        made.model.activation_checkpointing_enable({"use_reentrant": False})
        # transformers' GPT-2 and BERT keep no mask of a prefix where layers are checkpointed: refused there alone, too
        configs = {name: config for name, config in configs.items() if not isinstance(config, PrefixTuningConfig)}
    model = with_adapters(made, configs)
    names = [*configs, BASE, *reversed(configs)]
    inputs = rows(made, len(names))
    model.train()
    model.set_requires_grad(list(configs))
    weight = torch.randn(output(model, {**inputs, "adapter_names": names}).shape)
    (output(model, {**inputs, "adapter_names": names}) * weight).sum().backward()
    mixed = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    for name in configs:
        model.set_adapter(name)
        own = torch.tensor([other == name for other in names])
        (output(model, {key: value[own] for key, value in inputs.items()}) * weight[own]).sum().backward()
    for name, value in model.named_parameters():
        if value.grad is not None:
            size = value.grad.abs().max() + 1  # float32 has seven digits, and some of these are far above 1
            close(mixed.pop(name) / size, value.grad / size)
    assert not mixed


def test_dropout_acts_in_training_and_each_adapter_has_its_own() -> None:
    made = models.llama()
    configs = {name: LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=p) for name, p in (("a", 0.0), ("b", 0.5))}
    model = with_adapters(made, configs)
    inputs = {"input_ids": models.ids(2), "adapter_names": ["a", "b"]}
    model.train()
    one, other = output(model, inputs), output(model, inputs)
    close(one[0], other[0])
    far(one[1], other[1])


def test_a_route_holds_for_all_calls_inside_it() -> None:
    tiny = models.llama()
    model = with_adapters(tiny, loras(2, ["q_proj"]))
    inputs = rows(tiny, 3)
    names = ["n1", BASE, "n0"]
    with torch.no_grad():
        expected = output(model, {**inputs, "adapter_names": names})
        with model.route(names):
            assert torch.equal(output(model, inputs), expected)
            assert torch.equal(output(model, inputs), expected)
            with model.disable_adapter():
                close(output(model, inputs), torch.cat([alone(model, BASE, inputs)]))
        assert not torch.equal(output(model, inputs), expected)


def test_what_cannot_be_routed_is_said() -> None:
    tiny = models.llama()
    model = with_adapters(tiny, loras(2, ["q_proj"]))
    inputs = rows(tiny, 3)
    with pytest.raises(AdapterError, match="no adapter 'n9'"):
        model(**inputs, adapter_names=["n0", "n1", "n9"])
    with pytest.raises(AdapterError, match="2 names, and the batch 3 rows"):
        model(**inputs, adapter_names=["n0", "n1"])
    with pytest.raises(AdapterError, match="a list of names"):
        model(**inputs, adapter_names="n0")
    with pytest.raises(AdapterError, match="no adapter 'n9'"):
        model.set_requires_grad(["n9"])
    model.set_adapter("n0")
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged"):
        model(**inputs, adapter_names=["n0", "n1", BASE])


def test_positions_that_nobody_can_give_are_an_error() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(vocab_size=64, max_position_embeddings=64, **sizes)).eval()
    configs = {f"p{n}": PrefixTuningConfig(num_virtual_tokens=n, task_type="SEQ_2_SEQ_LM") for n in (2, 3)}
    made = with_adapters(Tiny(model, {}), configs)
    inputs = {"input_ids": models.ids(2), "decoder_input_ids": models.ids(2, 4)}
    assert_rows_as_alone(made, ["p2", "p2"], inputs)
    with pytest.raises(AdapterError, match="equally many"):
        made(**inputs, adapter_names=["p2", "p3"])


@pytest.mark.parametrize("tokens", [1, 5])
def test_gates_and_fill_are_not_mixed_up(tokens: int) -> None:
    """A prompt's virtual tokens would be in the means of others' rows, unless all have as many."""
    tiny, gated = models.gpt2(), UnionConfig(gated=True, methods=[LoraConfig(r=2, target_modules=["c_attn"])])
    configs = {"gated": gated, "unipelt": UniPeltConfig(num_virtual_tokens=2, r=2, reduction_factor=4)}
    model = with_adapters(tiny, {**configs, "prompt": PromptTuningConfig(num_virtual_tokens=tokens)})
    for name in configs:
        with pytest.raises(AdapterError, match="mean over the tokens of a row"):
            model(**rows(tiny, 2), adapter_names=[name, "prompt"])
    assert_rows_as_alone(model, ["gated", "unipelt", BASE], rows(tiny, 3))  # also after that


def test_autocast_is_that_of_each_row_alone() -> None:
    """The products of a batch are in autocast's precision, as those of one adapter are."""
    tiny = models.llama()
    model = with_adapters(tiny, loras(3, ["q_proj", "v_proj"]))
    names, inputs = ["n0", "n1", BASE, "n2"], rows(tiny, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        together = model(**inputs, adapter_names=names).logits
        each = [
            alone(model, name, {key: value[i : i + 1] for key, value in inputs.items()}) for i, name in enumerate(names)
        ]
    difference = together - torch.cat(each)
    assert difference.norm() < 1e-2 * together.norm(), "more than bfloat16 rounds"
    assert together.dtype == torch.bfloat16


def used_again(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The output of a second pass, which keeps what it makes."""
    torch.manual_seed(0)
    first = output(model, inputs)
    torch.manual_seed(0)
    found = output(model, inputs)
    close(found, first)
    return found


def test_a_change_inside_the_block_is_seen() -> None:
    """Whatever is kept from one call to the next: an optimizer's step, and weights that are put in others' place."""
    tiny = models.llama()
    model = with_adapters(tiny, {name: LoraConfig(r=2, target_modules=["q_proj"]) for name in ("a", "b")})
    names, inputs = ["a", "b"], rows(tiny, 2)
    with torch.no_grad(), model.route(names):
        before = used_again(model, inputs)
        for name, value in model.named_parameters():
            if ".a." in name:
                value.mul_(2)
        stepped = used_again(model, inputs)
        model.set_requires_grad("b")
        optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if ".b." in n], lr=0.1, fused=True)
        for _ in range(2):  # such a step counts as no change of a parameter
            with torch.enable_grad():
                output(model, inputs).square().sum().backward()
            optimizer.step()
            fused = used_again(model, inputs)
            with torch.no_grad():
                close(fused, output(model, {**inputs, "adapter_names": names}))
        for module in model.modules():
            if type(module).__name__ == "LoraAdapter":
                module.load_state_dict({key: 3 * value for key, value in module.state_dict().items()}, assign=True)
        assigned = used_again(model, inputs)
        with torch.no_grad():
            close(assigned, output(model, {**inputs, "adapter_names": names}))
        for module in model.modules():
            if type(module).__name__ == "LoraAdapter":
                module.scale *= 2
        scaled = used_again(model, inputs)
        with torch.no_grad():
            close(scaled, output(model, {**inputs, "adapter_names": names}))
    far(stepped[:1], before[:1])
    close(stepped[1:], before[1:])
    far(assigned, stepped)
    far(scaled, assigned)


def test_a_step_is_seen_by_batches_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What short batches have kept is no more right after a step that a long one has led to."""
    monkeypatch.setattr(kernels, "FEW", 2 * 8 * 16)  # beyond it dropout enlarges by another number, in the last digits
    tiny = models.llama()
    configs = {name: LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.3) for name in ("a", "b")}
    model: Any = with_adapters(tiny, configs)
    model.train()
    model.set_requires_grad("b")
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if ".b." in n], lr=0.1, fused=True)

    def short() -> Tensor:
        with torch.no_grad():
            return used_again(model, {"input_ids": models.ids(2)[:, :3]})

    with model.route(["a", "b"]):
        short()
        output(model, {"input_ids": models.ids(2, 12)}).square().sum().backward()
        optimizer.step()
        found = short()
    with model.route(["a", "b"]):
        close(found, short())


def test_an_outline_has_rows_too() -> None:
    """On the meta device, which knows no autocast."""
    tiny = models.llama()
    model = with_adapters(tiny, loras(2, ["q_proj"])).to("meta")
    inputs = {name: value.to("meta") for name, value in rows(tiny, 2).items()}
    assert output(model, {**inputs, "adapter_names": ["n0", "n1"]}).is_meta
