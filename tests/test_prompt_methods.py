"""What methods with virtual tokens promise beyond the battery and beside HF PEFT."""

import inspect
import json
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from models import randomise
from safetensors.torch import load_file
from test_virtual_tokens import METHODS, MODELS, TOLERANCE, P, configs, trained
from torch import nn
from transformers import BertTokenizerFast

import trimtab
from trimtab import (
    AdapterError,
    ConfigError,
    LoraConfig,
    MergeError,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TargetError,
    get_peft_model,
    nearest_tokens,
    sites,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def adapter(model: Any) -> Any:
    """The one adapter with virtual tokens."""
    [found] = [module for module in model.modules() if isinstance(module, trimtab.prompts.VirtualTokens)]
    return found


# ------------------------------------------------------------------------------------------------- the formulas


@torch.no_grad()
def test_prompt_goes_before_the_embeddings() -> None:
    model, inputs = trained("prompt", "llama")
    got = model(**inputs)
    prompt = adapter(model).embedding
    assert prompt.shape == (P, 16)
    base = models.llama().model
    embeds = torch.cat([prompt.expand(2, -1, -1), base.get_input_embeddings()(inputs["input_ids"])], 1)
    labels = torch.cat([torch.full((2, P), -100), inputs["labels"]], 1)
    expected = base(inputs_embeds=embeds, labels=labels)
    torch.testing.assert_close(got.logits, expected.logits[:, P:])
    torch.testing.assert_close(got.loss, expected.loss)


@torch.no_grad()
def test_p_tuning_s_encoders() -> None:
    mlp = adapter(trained("p-mlp", "llama")[0])
    w1, b1, w2, b2, w3, b3 = mlp.encoder.parameters()
    assert [tuple(w.shape) for w in (w1, w2, w3)] == [(7, 16), (7, 7), (16, 7)]
    expected = ((mlp.embedding @ w1.T + b1).relu() @ w2.T + b2).relu() @ w3.T + b3
    torch.testing.assert_close(mlp(), expected)

    lstm = adapter(trained("p-lstm", "llama")[0])
    cells, head = lstm.encoder.lstm, lstm.encoder.head
    assert (cells.num_layers, cells.bidirectional, cells.hidden_size) == (2, True, 7)
    h = lstm.embedding
    for layer in range(2):
        h = torch.cat([_lstm(cells, layer, h, ""), _lstm(cells, layer, h.flip(0), "_reverse").flip(0)], 1)
    expected = (h @ head[0].weight.T + head[0].bias).relu() @ head[2].weight.T + head[2].bias
    torch.testing.assert_close(lstm(), expected)


def _lstm(cells: nn.LSTM, layer: int, x: torch.Tensor, direction: str) -> torch.Tensor:
    """One layer of Hochreiter and Schmidhuber's cells over x (T, in), from zero."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    a, b, c, d = (getattr(cells, f"{name}_l{layer}{direction}") for name in names)
    h, cell, out = torch.zeros(7), torch.zeros(7), []
    for step in x:
        i, f, g, o = (a @ step + b @ h + c + d).chunk(4)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        h = o.sigmoid() * cell.tanh()
        out.append(h)
    return torch.stack(out)


@torch.no_grad()
def test_prefix_lies_before_keys_and_values() -> None:
    """One head of one layer by hand, its keys behind the prefix, positions from P on."""
    model, inputs = trained("prefix-mlp", "gpt2")
    prefix = adapter(model)
    w1, b1, w2, b2 = prefix.encoder.parameters()
    flat = (prefix.embedding @ w1.T + b1).tanh() @ w2.T + b2
    assert flat.shape == (P, 2 * 2 * 16)  # layers, keys and values, width
    keys, values = flat[:, :16], flat[:, 16:32]
    base = models.gpt2().model.transformer
    places = torch.arange(P, P + 5)
    block = base.h[0]
    x = block.ln_1(base.wte(inputs["input_ids"][:1]) + base.wpe(places))[0]
    q, k, v = block.attn.c_attn(x).split(16, -1)
    k, v = torch.cat([keys, k]), torch.cat([values, v])
    heads = []
    for part in (slice(0, 8), slice(8, 16)):
        scores = q[:, part] @ k[:, part].T / 8**0.5
        scores = scores.masked_fill(torch.arange(P + 5) > places[:, None], -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, part])
    expected = block.attn.c_proj(torch.cat(heads, -1))
    seen: list[torch.Tensor] = []
    model.transformer.h[0].attn.register_forward_hook(lambda *call: seen.append(call[2][0]))
    model(inputs["input_ids"][:1])
    torch.testing.assert_close(seen[0][0], expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("prompt", 3 * 16),
        ("p-mlp", 3 * 16 + (16 + 1) * 7 + (7 + 1) * 7 + (7 + 1) * 16),
        ("prefix", 3 * 2 * 2 * (2 * 4)),  # tokens, layers, keys and values, 2 heads of 4 (queries have 4 heads)
        ("prefix-mlp", 3 * 8 + (8 + 1) * 7 + (7 + 1) * 32),
    ],
)
def test_counts(method: str, expected: int) -> None:
    model, _ = trained(method, "llama")
    assert model.get_nb_trainable_parameters()[0] == expected


# ---------------------------------------------------------------------------------------------- inputs, outputs


@torch.no_grad()
def test_results_are_of_the_user_s_tokens() -> None:
    model, inputs = trained("prompt", "llama")
    out = model(**inputs, output_hidden_states=True)
    assert {hidden.shape for hidden in out.hidden_states} == {(2, 5, 16)}
    loss, logits, *_ = model(**inputs, return_dict=False)
    torch.testing.assert_close((loss, logits), (out.loss, out.logits))
    assert model(inputs["input_ids"], logits_to_keep=2).logits.shape == (2, 2, 64)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, out.logits)
    places = torch.arange(5).expand(2, -1)
    torch.testing.assert_close(model(inputs["input_ids"], position_ids=places).logits, out.logits)
    with pytest.raises(AdapterError, match=r"labels \(2, 4\) do not fit the tokens \(2, 5\)"):
        model(inputs["input_ids"], labels=inputs["labels"][:, 1:])
    with pytest.raises(AdapterError, match="attention_mask of shape"):
        model(inputs["input_ids"], attention_mask=torch.ones(2, 1, 5, 5))


def test_the_signature_stays() -> None:
    """transformers.Trainer drops the data columns that forward does not name."""
    plain = inspect.signature(models.llama().model.forward)
    assert inspect.signature(trained("prompt", "llama")[0].forward) == plain


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model", ["llama-left", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("method", ["prompt", "prefix", "prefix-mlp"])
def test_gradient_checkpointing_changes_nothing(method: str, model: str, reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        adapted, inputs = trained(method, model)
        adapted.train()
        if checkpointed:
            adapted.activation_checkpointing_enable({"use_reentrant": reentrant})
            adapted.enable_input_require_grads()
        loss = adapted(**inputs).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in adapted.parameters() if p.requires_grad)])
    torch.testing.assert_close(found[1], found[0])


def test_a_part_that_is_called_by_itself_has_no_prefix() -> None:
    """The model puts it into the cache; attention without one, which nobody checkpoints, was given none."""
    adapted, inputs = trained("prefix", "llama")
    part = adapted.model
    adapted(**inputs)
    for mode in (True, False):
        part.train(mode)
        found = part(inputs["input_ids"], use_cache=False).last_hidden_state
        with adapted.disable_adapter():
            assert torch.equal(found, part(inputs["input_ids"], use_cache=False).last_hidden_state)


def test_prefix_refuses_checkpointed_layers_that_it_cannot_enter() -> None:
    model, inputs = trained("prefix", "llama")
    adapter(model).enters_attention = False
    model.train().activation_checkpointing_enable()
    with pytest.raises(AdapterError, match="gradient checkpointing"):
        model(**inputs)


# -------------------------------------------------------------------------------------------- beginnings, tokens


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_text_is_repeated_or_cut(tokenizer: Path) -> None:
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "w3 w9", "tokenizer_name_or_path": str(tokenizer)}
    for tokens, expected in {3: [2, 8, 14], 6: [2, 8, 14, 3, 2, 8], None: [2, 8, 14, 3]}.items():
        model = get_peft_model(models.llama().model, PromptTuningConfig(num_virtual_tokens=tokens, **text))
        table = model.get_input_embeddings().weight
        assert torch.equal(adapter(model).embedding, table[expected])
        assert nearest_tokens(model) == [[token] for token in expected]
        if tokens:
            hf = peft.get_peft_model(models.llama().model, peft.PromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=tokens, **text))  # fmt: skip
            assert torch.equal(hf.prompt_encoder["default"].embedding.weight, table[expected])
    words = BertTokenizerFast.from_pretrained(tokenizer)
    assert nearest_tokens(model, words) == [["[CLS]"], ["w3"], ["w9"], ["[SEP]"]]
    assert len(nearest_tokens(model, words, k=3)[0]) == 3


@torch.no_grad()
def test_hard_prompt_is_text_before_the_input(tokenizer: Path) -> None:
    config = PromptTuningConfig(
        prompt_tuning_init="TEXT", prompt_tuning_init_text="w3 w9", tokenizer_name_or_path=str(tokenizer),
        inference_mode=True,
    )  # fmt: skip
    tiny = models.llama()
    whole = torch.cat([torch.tensor([[2, 8, 14, 3]] * 2), tiny.inputs["input_ids"]], 1)
    expected = tiny.model(whole).logits[:, 4:]
    model = get_peft_model(tiny.model, config)
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(**tiny.inputs).logits, expected)


def test_sampled_from_the_vocabulary() -> None:
    model = get_peft_model(models.llama().model, PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB"))
    assert adapter(model).embedding.shape == (20, 16)
    table = model.get_input_embeddings().weight
    found = nearest_tokens(model)
    assert torch.equal(adapter(model).embedding, table[[row[0] for row in found]])
    assert len({row[0] for row in found}) > 5


@pytest.mark.parametrize("method", METHODS)
def test_learns(method: str) -> None:
    """Whether the first of six tokens is in the upper half of the vocabulary, on a frozen trunk of random weights."""
    tokens = models.ids(8, 6)
    batch = {"input_ids": tokens, "labels": (tokens[:, 0] > 32).long()}
    model = models.bert().model
    frozen = model(**batch).loss.item()
    torch.manual_seed(0)
    get_peft_model(model, configs(method, "SEQ_CLS")[1]).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.4 * frozen


# ------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("method", ["p-mlp", "p-lstm", "prefix-mlp"])
def test_training_goes_on_where_it_was(method: str, tmp_path: Path) -> None:
    """The encoder is saved beside what HF PEFT reads; without it, as HF PEFT saves, the flat numbers are trained."""
    model, inputs = trained(method, "llama")
    model.save_pretrained(tmp_path)
    flat = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    torch.testing.assert_close(flat, adapter(model)().detach())
    again = PeftModel.from_pretrained(models.llama().model, tmp_path, is_trainable=True)
    own, read = (dict(adapter(found).named_parameters()) for found in (model, again))
    assert own.keys() == read.keys()
    assert all(torch.equal(own[name], read[name]) for name in own)
    for found in (model, again):
        found(**inputs).loss.backward()
    assert all(torch.equal(own[name].grad, read[name].grad) for name in own)

    hf = peft.PeftModel.from_pretrained(models.llama().model, str(tmp_path))
    hf.save_pretrained(tmp_path / "hf")
    bare = PeftModel.from_pretrained(models.llama().model, tmp_path / "hf", is_trainable=True)
    assert adapter(bare).encoder is None
    assert [name for name, p in bare.named_parameters() if p.requires_grad] == ["adapters.default.embedding"]
    bare(**inputs).loss.backward()
    assert adapter(bare).embedding.grad.any()


@pytest.mark.parametrize("model", ["llama", "bert", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_files_are_hf_peft_s(method: str, model: str, tmp_path: Path) -> None:
    make, task, _ = MODELS[model]
    theirs, ours = configs(method, task)
    torch.manual_seed(0)
    peft.get_peft_model(make().model, theirs).save_pretrained(tmp_path / "hf")
    get_peft_model(make().model, ours).save_pretrained(tmp_path / "ours")
    written = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("hf", "ours")]
    for config in written:
        config.pop("peft_version", None)
    heads = [config.pop("modules_to_save") for config in written]
    assert written[1] == written[0]
    assert set(heads[1] or ()) == {"classifier"} & set(heads[0] or ())
    shapes = [
        {key: value.shape for key, value in load_file(tmp_path / who / "adapter_model.safetensors").items()}
        for who in ("hf", "ours")
    ]
    more = {key for key in shapes[1] if key.startswith("prompt_encoder.")}
    assert {key: shape for key, shape in shapes[1].items() if key not in more} == shapes[0]
    assert bool(more) == (method in ("p-mlp", "p-lstm", "prefix-mlp"))


# ------------------------------------------------------------------------------------------- beside other methods


@torch.no_grad()
def test_lora_acts_beside_a_prompt_and_a_second_prompt_does_not() -> None:
    model, inputs = trained("prompt", "llama")
    alone = model(**inputs).logits
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.add_adapter("prefix", PrefixTuningConfig(num_virtual_tokens=2))
    randomise(model, seed=5)
    model.set_adapter(["default", "lora"])
    both = model(**inputs).logits
    base = models.llama().model
    get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"]))
    state = {name.replace("lora", "default"): value for name, value in model.state_dict().items() if ".lora." in name}
    base.load_state_dict(state, strict=False)
    prompt = adapter_of(model, "default")().expand(2, -1, -1)
    embeds = torch.cat([prompt, base.get_input_embeddings()(inputs["input_ids"])], 1)
    torch.testing.assert_close(both, base(inputs_embeds=embeds).logits[:, P:], **TOLERANCE)
    assert not torch.allclose(both, alone)
    with pytest.raises(AdapterError, match=r"\['default', 'prefix'\] all put virtual tokens before the input"):
        model.set_adapter(["default", "prefix", "lora"])
    assert model.active_adapters == ["default", "lora"]
    with pytest.raises(MergeError, match="Prompt changes what goes into a module"):
        model.merge_adapter()
    model.merge_adapter(["lora"])
    torch.testing.assert_close(model(**inputs).logits, both, **TOLERANCE)


def adapter_of(model: Any, name: str) -> Any:
    return sites.adapters(model)[name]


def test_prefix_beside_an_adapter_of_attention_itself() -> None:
    """Two kinds of adapters at one module, put there in either order."""

    class Doubling(trimtab.Adapter):
        def after(self, site: nn.Module, x: Any, y: Any) -> Any:
            return (2 * y[0], *y[1:])

    class Config(trimtab.PeftConfig):
        peft_type = "DOUBLING"

        def adapters(self, model: nn.Module) -> dict[str, trimtab.Adapter]:
            return {"model.layers.0.self_attn": Doubling()}

    outputs = []
    prefix = PrefixTuningConfig(num_virtual_tokens=2)
    for first, second in ((Config(), prefix), (prefix, Config())):
        tiny = models.llama()
        model = get_peft_model(tiny.model, first, "a")
        model.add_adapter("b", second)
        model.set_adapter(["a", "b"])
        randomise(model)
        assert len(model.model.layers[0].self_attn.adapters) == 2
        outputs.append(model(**tiny.inputs).logits)
        cls = type(models.llama().model.model.layers[0].self_attn)
        assert isinstance(model.model.layers[0].self_attn, cls)
        model.unload()
        assert type(model.model.layers[0].self_attn) is cls
    torch.testing.assert_close(*outputs)


# ------------------------------------------------------------------------------------------------------ nonsense


@pytest.mark.parametrize(
    ("tiny", "config", "error", "message"),
    [
        (models.vit, PromptTuningConfig, TargetError, "takes no inputs_embeds.*LoraConfig"),
        (models.vit, PrefixTuningConfig, TargetError, "takes no past_key_values.*LoraConfig"),
        (models.mlp, PromptEncoderConfig, TargetError, "Mlp takes no inputs_embeds"),
        (models.embeddings, PrefixTuningConfig, TargetError, "Embeddings takes no past_key_values"),
        (models.llama, lambda: PromptTuningConfig(num_virtual_tokens=0), ConfigError, "num_virtual_tokens=0.*to 1"),
        (models.llama, lambda: PromptTuningConfig(token_dim=8), ConfigError, "token_dim=8, but .* have 16"),
        (models.llama, lambda: PrefixTuningConfig(num_attention_heads=4), ConfigError, "heads=4, but .* it is 2"),
        (models.llama, lambda: PromptTuningConfig(prompt_tuning_init="TEXT"), ConfigError, "tuning_init_text too"),
        (models.llama, lambda: PromptTuningConfig(prompt_tuning_init="text"), ConfigError, "'TEXT', 'SAMPLE_VOCAB'"),
        (models.llama, lambda: PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="a"), ConfigError,
         "tokenizer_name_or_path too"),
        (models.llama, lambda: PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="a",
         tokenizer_name_or_path="./nowhere"), ConfigError, "'./nowhere' gives no tokenizer"),
        (models.llama, lambda: PromptTuningConfig(tokenizer_kwargs={"a": 1}), ConfigError, "are read with"),
        (models.llama, lambda: PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="a",
         tokenizer_name_or_path="b", tokenizer_kwargs={"trust_remote_code": True}), ConfigError, "trust_remote_code"),
        (models.llama, lambda: PromptEncoderConfig(encoder_dropout=0.1), ConfigError, "are LSTM's"),
        (models.llama, lambda: PrefixTuningConfig(num_virtual_token=3), ConfigError, "'num_virtual_tokens'"),
    ],
)  # fmt: skip
def test_nonsense_is_refused(tiny: Any, config: Any, error: type[Exception], message: str) -> None:
    model = tiny().model
    classes = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        get_peft_model(model, config())
    assert [type(module) for module in model.modules()] == classes
