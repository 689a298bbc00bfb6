"""Adapters of HF PEFT act here as they do there, ours act there, and both libraries write the same files."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from models import Tiny, output, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab import CheckpointError, LoraConfig, PeftConfig, PeftModel, get_peft_model
from trimtab.adapter import TrainedCopy

pytestmark = [
    # HF PEFT asks transformers for a property by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # bitsandbytes says at each call in which precision it multiplies.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]
EMBEDDINGS_ARE_SAVED_TOO = "ignore:Setting `save_embedding_layers` to `True`:UserWarning"  # and we read such files
TIED = "ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"  # advice on merging, not done here
GROUPS = "ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning"  # the same


class Pictures(nn.Module):
    """Convolutions of the kinds that HF PEFT computes as they are: it leaves out dilation and padding_mode."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(4, 6, (3, 3, 2), stride=(2, 1, 1), padding=(1, 0, 1))
        self.plane = nn.Conv2d(12, 8, (3, 2), padding=(2, 1), groups=2)
        self.line = nn.Conv1d(8, 10, 3, stride=2, padding="valid")
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.volume(x))
        h = torch.tanh(self.plane(h.flatten(1, 2)))
        return self.head(torch.tanh(self.line(h.flatten(2))).mean(-1))


def pictures() -> Tiny:
    torch.manual_seed(0)
    return Tiny(Pictures().eval(), {"x": torch.randn(2, 4, 4, 9, 9)})


class Head(nn.Module):
    """A head of two layers, as RoBERTa's."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 7)
        self.out_proj = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(torch.tanh(self.dense(x)))


def two_layer_head() -> Tiny:
    tiny = models.mlp()
    tiny.model.head = Head()
    return tiny


class Gate(nn.Module):
    """A module with a bias of its own and a layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(6))
        self.inner = nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.bias


def gate() -> Tiny:
    tiny = models.mlp()
    tiny.model.second = Gate()
    return tiny


def training(build: Callable[[], Tiny]) -> Callable[[], Tiny]:
    """In training mode: on the fast path of nn.TransformerEncoderLayer HF PEFT's adapters do nothing."""

    def built() -> Tiny:
        tiny = build()
        tiny.model.train()
        return tiny

    return built


@dataclass(frozen=True)
class Case:
    id: str
    tiny: Callable[[], Tiny]
    settings: dict[str, Any]
    quiet: tuple[str, ...] = ()  # further warnings of HF PEFT


def case(id: str, tiny: Callable[[], Tiny], *quiet: str, **settings: Any) -> Any:
    marks = [pytest.mark.filterwarnings(rule) for rule in quiet]
    return pytest.param(Case(id, tiny, {"r": 3, "lora_alpha": 5, **settings}), id=id, marks=marks)


QV = {"target_modules": ["q_proj", "v_proj"]}
ENCODER = training(models.encoder)
CASES = [
    case("llama", models.llama, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    case("bert", models.bert, target_modules=["query", "value"], task_type="SEQ_CLS"),
    case("t5", models.t5, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM"),
    case("gpt2", models.gpt2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
    case("opt", models.opt, target_modules=["q_proj", "fc2"], task_type="CAUSAL_LM"),
    case("vit", models.vit, target_modules=["q_proj", "fc1", "projection"], modules_to_save=["classifier"]),
    case("default-llama", models.llama),
    case("default-bert", models.bert),
    case("default-t5", models.t5),
    case("default-gpt2", models.gpt2, fan_in_fan_out=True),
    case("default-opt", models.opt),
    case("all-linear-llama", models.llama, target_modules="all-linear"),
    case("all-linear-bert", models.bert, target_modules="all-linear", task_type="SEQ_CLS"),
    case("all-linear-t5", models.t5, target_modules="all-linear"),
    case("all-linear-gpt2", models.gpt2, target_modules="all-linear", fan_in_fan_out=True),
    case("all-linear-opt", models.opt, target_modules="all-linear"),
    case("all-linear-vit", models.vit, target_modules="all-linear"),
    case("bias-all-bert", models.bert, target_modules=["query", "dense"], bias="all"),
    case("bias-all-head", models.bert, target_modules=["query", "value"], bias="all", task_type="SEQ_CLS"),
    case("bias-all-two-layer-head", two_layer_head, target_modules=["first"], modules_to_save=["head"], bias="all"),
    case("bias-all-gate", gate, target_modules=["inner"], bias="all"),
    case("bias-all-t5", models.t5, target_modules=["q"], bias="all"),  # its relative_attention_bias is a weight
    case("bias-all-gpt2", models.gpt2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True),
    case("bias-all-vit", models.vit, target_modules=["projection", "fc1"], bias="all"),
    case("bias-lora_only", models.opt, target_modules=["q_proj", "fc2"], bias="lora_only"),
    case("patterns", models.llama, **QV, rank_pattern={"v_proj": 2, "layers.0.self_attn.q_proj": 5},
         alpha_pattern={"model.layers.1.self_attn.v_proj": 7}),
    case("pattern-expressions", models.llama, **QV, rank_pattern={r"layers\.[01]\.self_attn\.v_proj": 2},
         alpha_pattern={r"^model\.layers\.1\..*": 7, "v_proj": 11}),
    case("rslora", models.llama, **QV, use_rslora=True),
    case("modules_to_save", models.llama, **QV, modules_to_save=["lm_head", "embed_tokens"]),
    case("modules_to_save-ending", models.llama, **QV, modules_to_save=["norm"]),  # means input_layernorm as well
    case("embeddings", models.llama, EMBEDDINGS_ARE_SAVED_TOO, target_modules=["embed_tokens", "q_proj", "lm_head"]),
    case("embeddings-tied", lambda: models.llama(tie_word_embeddings=True), EMBEDDINGS_ARE_SAVED_TOO, TIED,
         target_modules=["embed_tokens", "q_proj"]),
    case("embeddings-gpt2", models.gpt2, EMBEDDINGS_ARE_SAVED_TOO, target_modules=["wte", "wpe"]),
    case("embeddings-plain", models.embeddings, target_modules=["token", "position", "inner"]),
    case("layers_to_transform", models.llama, **QV, layers_to_transform=[1]),
    case("layers_pattern", models.llama, **QV, layers_to_transform=0, layers_pattern="layers"),
    case("exclude_modules", models.llama, **QV, exclude_modules=["layers.0.self_attn.q_proj"]),
    case("exclude-expression", models.llama, **QV, exclude_modules=r".*\.0\.self_attn\.q_proj"),
    case("expression", models.llama, target_modules=r".*\.(q|o)_proj"),
    case("plain", models.mlp, target_modules=["first"], modules_to_save=["norm", "head"]),
    case("convolutions", pictures, GROUPS, target_modules=["volume", "plane", "line", "head"], r=2, bias="lora_only"),
    case("attention", ENCODER, target_modules=["self_attn"]),
    case("attention-patterns", ENCODER, target_modules=["self_attn", "linear1"], rank_pattern={"self_attn": 2},
         alpha_pattern={"layers.0.self_attn": 11}),
    case("attention-layers", ENCODER, target_modules=["self_attn"], layers_to_transform=[1]),
    case("attention-bias-all", ENCODER, target_modules=["self_attn"], bias="all"),
    case("attention-bias-lora_only", ENCODER, target_modules=["self_attn", "linear2"], bias="lora_only"),
    case("bias-all-encoder", ENCODER, target_modules=["head"], bias="all"),
    case("4bit", models.quantized4, target_modules=["first", "second"]),
    case("8bit", models.quantized8, target_modules=["first", "second"]),
]  # fmt: skip


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return output(model, inputs).clone()


def theirs(case: Case, name: str = "default", seed: int = 1) -> tuple[Any, dict[str, Tensor]]:
    """A model with an adapter of HF PEFT, all that it trains shifted."""
    model, inputs = case.tiny()
    mode = model.training
    adapted = peft.get_peft_model(model, peft.LoraConfig(**case.settings), adapter_name=name).train(mode)
    shift(adapted, seed)
    return adapted, inputs


def shift(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def ours(case: Case, name: str = "default") -> tuple[Any, dict[str, Tensor]]:
    model, inputs = case.tiny()
    settings = {key: value for key, value in case.settings.items() if key != "fan_in_fan_out"}  # the layer tells
    get_peft_model(model, LoraConfig(**settings), adapter_name=name)
    randomise(model)
    return model, inputs


def equal(got: Tensor, expected: Tensor, without: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (expected - without).abs().max() > 0.05  # or equality would mean nothing


@pytest.mark.parametrize("case", CASES)
def test_their_adapter_acts_here(case: Case, tmp_path: Path) -> None:
    adapted, inputs = theirs(case)
    expected, base = run(adapted, inputs), run(case.tiny().model, inputs)
    adapted.save_pretrained(tmp_path)
    model = case.tiny().model
    PeftModel.from_pretrained(model, tmp_path)
    equal(run(model, inputs), expected, base)


@pytest.mark.parametrize("case", CASES)
def test_our_adapter_acts_there(case: Case, tmp_path: Path) -> None:
    """HF PEFT warns about a missing or unexpected key and an unknown setting: those would be errors here."""
    model, inputs = ours(case)
    expected, base = run(model, inputs), run(case.tiny().model, inputs)
    model.save_pretrained(tmp_path / "ours")
    adapted = peft.PeftModel.from_pretrained(case.tiny().model, tmp_path / "ours").train(model.training)
    equal(run(adapted, inputs), expected, base)
    adapted.save_pretrained(tmp_path / "theirs")
    saved, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    beside = {key for key in again if key not in saved}
    assert set(saved) <= set(again)
    assert all(torch.equal(saved[key], again[key]) for key in saved)
    # What else HF PEFT saves: the base's own embeddings, and a second time the biases of trained copies.
    assert all(
        ".base_layer.weight" in key or ".original_module." in key or ".modules_to_save." in key for key in beside
    )


def test_a_saved_adapter_literally(tmp_path: Path) -> None:
    model, _ = models.bert(num_hidden_layers=1)
    config = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"], task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    attention = "base_model.model.bert.encoder.layer.0.attention.self"
    assert {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()} == {
        f"{attention}.query.lora_A.weight": ((4, 16), torch.float32),
        f"{attention}.query.lora_B.weight": ((16, 4), torch.float32),
        f"{attention}.value.lora_A.weight": ((4, 16), torch.float32),
        f"{attention}.value.lora_B.weight": ((16, 4), torch.float32),
        "base_model.model.classifier.bias": ((3,), torch.float32),
        "base_model.model.classifier.weight": ((3, 16), torch.float32),
    }
    assert (tmp_path / "adapter_config.json").read_text(encoding="utf-8") == (
        """{
  "alora_invocation_tokens": null,
  "alpha_pattern": {},
  "auto_mapping": null,
  "base_model_name_or_path": null,
  "bias": "none",
  "corda_config": null,
  "eva_config": null,
  "exclude_modules": null,
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "layers_pattern": null,
  "layers_to_transform": null,
  "lora_alpha": 16,
  "lora_dropout": 0.1,
  "lora_ga_config": null,
  "modules_to_save": [
    "classifier"
  ],
  "peft_type": "LORA",
  "r": 4,
  "rank_pattern": {},
  "revision": null,
  "target_modules": [
    "query",
    "value"
  ],
  "target_parameters": null,
  "task_type": "SEQ_CLS",
  "trainable_token_indices": null,
  "use_dora": false,
  "use_rslora": false
}
"""
    )


def test_keys_of_an_attention_literally(tmp_path: Path) -> None:
    model, _ = models.encoder()
    get_peft_model(model, LoraConfig(r=2, target_modules=["layers.0.self_attn"], bias="lora_only"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    attention = "base_model.model.encoder.layers.0.self_attn"
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"{attention}.lora_A.weight": (2, 8),
        f"{attention}.lora_B.weight": (24, 2),
        f"{attention}.base_layer.out_proj.lora_A.weight": (2, 8),
        f"{attention}.base_layer.out_proj.lora_B.weight": (8, 2),
        f"{attention}.base_layer.out_proj.base_layer.bias": (8,),
    }


def test_convolutions_are_saved_with_their_kernels(tmp_path: Path) -> None:
    model, _ = pictures()
    get_peft_model(model, LoraConfig(r=4, target_modules=["volume", "plane", "line"]))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.removeprefix("base_model.model."): tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "volume.lora_A.weight": (4, 4, 3, 3, 2),
        "volume.lora_B.weight": (6, 4, 1, 1, 1),
        "plane.lora_A.weight": (4, 12, 3, 2),
        "plane.lora_B.weight": (8, 2, 1, 1),
        "line.lora_A.weight": (4, 8, 3),
        "line.lora_B.weight": (10, 4, 1),
    }


@pytest.mark.parametrize("case", CASES)
def test_configs_mean_the_same(case: Case, tmp_path: Path) -> None:
    """All that we write they know, as it was meant; and all that they write we read."""
    model, _ = ours(case)
    model.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text(encoding="utf-8"))
    read = peft.PeftConfig.from_pretrained(str(tmp_path / "ours")).to_dict()
    differ = {key for key, value in written.items() if read[key] != value}
    assert not differ - {"target_modules", "modules_to_save", "exclude_modules"}
    for key in differ:  # there they are sets, and both names of a classifier's head are added
        assert set(written[key]) <= set(read[key])
        assert set(read[key]) - set(written[key]) <= {"classifier", "score"}
    peft.LoraConfig(**case.settings).save_pretrained(str(tmp_path / "theirs"))
    config = PeftConfig.from_pretrained(tmp_path / "theirs").to_dict()
    for key, value in case.settings.items():
        assert sorted(config[key]) == sorted(value) if isinstance(value, list) else config[key] == value


TWO = [
    Case("", models.bert, {"r": 3, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    Case(
        "",
        models.bert,
        {"r": 2, "target_modules": ["dense"], "exclude_modules": ["pooler.dense"], "task_type": "SEQ_CLS"},
    ),
]


def test_several_of_theirs_act_here(tmp_path: Path) -> None:
    adapted, inputs = theirs(TWO[0])
    first = run(adapted, inputs)
    adapted.add_adapter("second", peft.LoraConfig(**TWO[1].settings))
    adapted.set_adapter("second")
    shift(adapted, seed=2)
    second = run(adapted, inputs)
    adapted.save_pretrained(tmp_path)
    model, base = models.bert().model, run(models.bert().model, inputs)
    PeftModel.from_pretrained(model, tmp_path)
    model.load_adapter(tmp_path / "second", "other")
    model.load_adapter(tmp_path, "third", subfolder="second")
    equal(run(model, inputs), first, base)
    for name in ("other", "third"):
        model.set_adapter(name)
        equal(run(model, inputs), second, base)


def test_several_of_ours_act_there(tmp_path: Path) -> None:
    model, inputs = ours(TWO[0])
    first = run(model, inputs)
    model.add_adapter("second", LoraConfig(**TWO[1].settings))
    model.set_adapter("second")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters.second." in name:
                parameter.normal_(std=0.3)
    second = run(model, inputs)
    model.save_pretrained(tmp_path)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    files = {"adapter_config.json", "adapter_model.safetensors"}
    assert names == files | {f"second/{name}" for name in files}
    base = run(models.bert().model, inputs)
    adapted = peft.PeftModel.from_pretrained(models.bert().model, tmp_path)
    adapted.load_adapter(tmp_path / "second", "other")
    equal(run(adapted, inputs), first, base)
    adapted.set_adapter("other")
    equal(run(adapted, inputs), second, base)


def test_one_adapter_with_a_name_goes_where_theirs_goes(tmp_path: Path) -> None:
    """To a folder of that name, also if there is no other."""
    one, _ = theirs(TWO[0], "mine")
    other, _ = ours(TWO[0], "mine")
    one.save_pretrained(tmp_path / "theirs")
    other.save_pretrained(tmp_path / "ours")
    for folder in ("theirs", "ours"):
        assert (tmp_path / folder / "mine" / "adapter_model.safetensors").is_file()
        assert not (tmp_path / folder / "adapter_model.safetensors").exists()


def with_more_words(tmp_path: Path) -> Callable[[], Tiny]:
    """A saved Llama, loaded with its vocabulary resized, which sets new rows at random."""
    models.llama().model.save_pretrained(tmp_path / "base")

    def build() -> Tiny:
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
        model.resize_token_embeddings(models.VOCABULARY + 3, mean_resizing=False)
        return Tiny(model, {"input_ids": models.ids() + 3})

    return build


@pytest.mark.filterwarnings(EMBEDDINGS_ARE_SAVED_TOO)
def test_embeddings_that_were_resized_come_along(tmp_path: Path) -> None:
    """HF PEFT saves them whole and says nothing of it in the config. Here they become trained copies."""
    resized = Case("", with_more_words(tmp_path), {"r": 3, "target_modules": ["q_proj"]})
    torch.manual_seed(1)
    adapted, inputs = theirs(resized)
    expected = run(adapted, inputs)
    adapted.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(2)
    model = resized.tiny().model
    base = run(model, inputs)
    PeftModel.from_pretrained(model, tmp_path / "adapter")
    equal(run(model, inputs), expected, base)
    assert model.peft_config["default"].modules_to_save == ["model.embed_tokens", "lm_head"]
    assert isinstance(model.lm_head.adapters["default"], TrainedCopy)
    model.save_pretrained(tmp_path / "again")
    torch.manual_seed(3)
    equal(run(peft.PeftModel.from_pretrained(resized.tiny().model, tmp_path / "again").eval(), inputs), expected, base)


@pytest.mark.filterwarnings(EMBEDDINGS_ARE_SAVED_TOO)
def test_embeddings_that_were_resized_do_not_fit_a_base_that_was_not(tmp_path: Path) -> None:
    adapted, _ = theirs(Case("", with_more_words(tmp_path), {"r": 3, "target_modules": ["q_proj"]}))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        CheckpointError, match=r"wrong shape: .*embed_tokens.weight is \(67, 16\) in the file, \(64, 16\)"
    ):
        PeftModel.from_pretrained(models.llama().model, tmp_path / "adapter")


@pytest.mark.filterwarnings(EMBEDDINGS_ARE_SAVED_TOO)
def test_targeted_embeddings_of_another_base_are_refused(tmp_path: Path) -> None:
    """The file holds the base's table beside its adapter: loading would change what the adapter was trained on."""
    adapted, _ = theirs(Case("", models.llama, {"target_modules": ["embed_tokens"]}))
    adapted.save_pretrained(tmp_path)
    other = models.llama().model
    with torch.no_grad():
        other.model.embed_tokens.weight[7, 3] += 1
    with pytest.raises(CheckpointError, match=r"^.*\nUnexpected: \S*embed_tokens\.base_layer\.weight$"):
        PeftModel.from_pretrained(other, tmp_path)


def test_a_second_copy_that_differs_is_refused(tmp_path: Path) -> None:
    """With bias="all" HF PEFT saves the bias of a trained copy twice, and reads either."""
    settings = {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}
    adapted, _ = theirs(Case("", models.bert, settings))
    adapted.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.classifier.modules_to_save.bias"][0] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"\nUnexpected: \S*classifier\.modules_to_save\.bias$"):
        PeftModel.from_pretrained(models.bert().model, tmp_path)
