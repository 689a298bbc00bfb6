"""The class swap: what must not show, and modules whose weights are read without their being called."""

import copy
import inspect
import pickle
from typing import Any

import models
import pytest
import torch
from battery import close, far, run, same_bits
from models import Tiny, randomise
from torch import Tensor, nn

from trimtab import LoraConfig, TargetError, get_peft_model, sites, swap
from trimtab.adapter import Adapter, TrainedCopy

TRANSFORMERS = pytest.mark.parametrize("build", models.TRANSFORMERS.values(), ids=models.TRANSFORMERS)


def lora(model: nn.Module, targets: Any, **settings: Any) -> Any:
    config = LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": targets, **settings})
    adapted = get_peft_model(model, config)
    randomise(adapted)
    return adapted


def at_blocks(tiny: Tiny, blocks: str) -> Any:
    """A model with an adapter that does nothing at each block of a list; a method may well live there."""
    model = tiny.model
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for block in model.get_submodule(blocks):
        sites.add(block, None, "default", Adapter(), sites.Active())
    return model


# ----------------------------------------------------------------------------------------------- what must not show


def test_a_generated_class_looks_like_the_original() -> None:
    model, _ = models.mlp()
    root, layer = type(model), type(model.first)
    lora(model, ["first"])
    for made, original in ((type(model), root), (type(model.first), layer)):
        assert made is not original
        assert issubclass(made, original)
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(made, name) == getattr(original, name), name
        assert inspect.signature(made.forward) == inspect.signature(original.forward)
    assert repr(model.first).startswith("Linear(\n  in_features=5, out_features=7")


def test_the_mode_of_every_part_is_set_anew() -> None:
    model = lora(models.mlp().model, ["first"])
    for mode in (True, False):
        model.train(mode)
        model.first.adapters.train(not mode)
        assert model.train(mode) is model
        assert {part.training for part in model.modules()} == {mode}


def test_modules_of_one_class_stay_of_one_class() -> None:
    model = lora(models.mlp().model, ["first", "second"])
    assert type(model.first) is type(model.second)
    assert type(lora(models.mlp().model, ["first"])) is type(model)


@TRANSFORMERS
def test_a_transformers_model_keeps_its_signature_and_class(build: Any) -> None:
    model, _ = build()
    original, signature = type(model), inspect.signature(model.forward)
    lora(model, "all-linear")
    assert isinstance(model, original)
    assert type(model).__name__ == original.__name__
    assert inspect.signature(model.forward) == signature
    assert type(model).from_pretrained == original.from_pretrained  # that one loads base models


@TRANSFORMERS
def test_hidden_states_and_attentions_are_still_returned(build: Any) -> None:
    """transformers finds the layers to record by their class."""
    model, inputs = build(attn_implementation="eager")
    sides = ("encoder_", "decoder_") if model.config.is_encoder_decoder else ("",)
    names = [f"{side}{what}" for side in sides for what in ("hidden_states", "attentions")]
    wanted = {**inputs, "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        before = model(**wanted)
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        after = model(**wanted)
    for name in names:
        assert len(after[name]) == len(before[name]) > 0
        assert all(same_bits(a, b) for a, b in zip(after[name], before[name], strict=True))


@pytest.mark.parametrize(
    ("build", "blocks"),
    [(models.llama, "model.layers"), (models.bert, "bert.encoder.layer"), (models.gpt2, "transformer.h")],
    ids=["llama", "bert", "gpt2"],
)
def test_hidden_states_are_recorded_where_the_block_itself_is_a_site(build: Any, blocks: str) -> None:
    tiny = build()
    with torch.no_grad():
        before = tiny.model(**tiny.inputs, output_hidden_states=True).hidden_states
        after = at_blocks(tiny, blocks)(**tiny.inputs, output_hidden_states=True).hidden_states
    assert len(after) == len(before) == 3
    assert all(same_bits(a, b) for a, b in zip(after, before, strict=True))


def test_accelerate_does_not_split_a_block_that_is_a_site() -> None:
    """It knows the blocks by the name of their class."""
    from accelerate import infer_auto_device_map

    tiny = models.llama()
    block = sum(p.numel() * 4 for p in tiny.model.model.layers[0].parameters())
    unsplit = tiny.model._no_split_modules
    assert "LlamaDecoderLayer" in unsplit
    model = at_blocks(tiny, "model.layers")
    embeddings = tiny.model.model.embed_tokens.weight.numel() * 4
    memory = {"cpu": embeddings + 2 * block, "disk": 10**9}  # the second block with its adapter fits only in part
    places = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=list(unsplit))
    assert set(places.values()) == {"cpu", "disk"}
    assert not [name for name in places if name.startswith("model.layers.") and name.count(".") > 2]


def test_trainer_keeps_the_columns_that_forward_names(tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    model = lora(models.bert().model, ["query", "value"])
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", "token_type_ids", "labels"} <= set(trainer._signature_columns)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_generated_classes_pickle(protocol: int) -> None:
    model, inputs = models.mlp()
    lora(model, ["first", "second"], modules_to_save=["head"])
    again = pickle.loads(pickle.dumps(model, protocol))
    assert type(again) is type(model)
    assert type(again.first) is type(model.first)
    assert same_bits(run(again, inputs), run(model, inputs))


def test_a_single_site_copies_and_pickles() -> None:
    model, _ = models.mlp()
    lora(model, ["first"])
    x = torch.randn(2, 5)
    for again in (copy.copy(model.first), copy.deepcopy(model.first), pickle.loads(pickle.dumps(model.first))):
        assert type(again) is type(model.first)
        assert same_bits(again(x), model.first(x))


def test_taking_one_mixin_out_of_two_keeps_the_other() -> None:
    class Inner(swap.Swapped, nn.Module):
        pass

    class Outer(swap.Swapped, nn.Module):
        pass

    layer = nn.Linear(2, 2)
    swap.swap_in(layer, Inner)
    swap.swap_in(layer, Outer)
    assert swap.lineage(type(layer)) == ((Inner, Outer), nn.Linear)
    swap.swap_out(layer, Inner)
    assert swap.lineage(type(layer)) == ((Outer,), nn.Linear)
    swap.swap_out(layer, Outer)
    assert type(layer) is nn.Linear


# ---------------------------------------------------------------------------------------------------- how it is called


class Keywords(nn.Module):
    """Calls its layers by keyword, positionally, and with more than one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 5)
        self.linear = nn.Linear(5, 4)
        self.pair = Pair()
        self.loose = Loose()
        self.constant = Constant()

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.linear(input=self.table(input=input_ids))
        return self.loose(anything=self.pair(scale=2.0, x=h) + self.pair(h, 3.0)) + self.constant()


class Affine(Adapter):
    """x -> a x + b before, y -> c y + d x after: the order in which two of these nest shows."""

    def __init__(self, a: float, b: float, c: float, d: float) -> None:
        super().__init__()
        self.numbers = a, b, c, d

    def before(self, site: nn.Module, x: Any) -> Any:
        a, b, _, _ = self.numbers
        return a * x + b

    def after(self, site: nn.Module, x: Any, y: Any) -> Any:
        _, _, c, d = self.numbers
        return c * y + d * x


def test_active_adapters_nest_in_their_order() -> None:
    """g(x) = p.after(x, f(p.before(x))), and around that h(x) = q.after(x, g(q.before(x)))."""
    model, inputs = models.mlp()
    model.first = nn.Linear(5, 5)
    f, x = copy.deepcopy(model.first), inputs["x"]
    get_peft_model(model, LoraConfig(r=2, target_modules=["first"]), "p")
    model.add_adapter("q", LoraConfig(r=2, target_modules=["first"]))
    model.first.adapters["p"], model.first.adapters["q"] = Affine(2, 1, 3, 5), Affine(-1, 4, 0.5, 7)

    def g(x: Tensor) -> Tensor:
        return 3 * f(2 * x + 1) + 5 * x

    model.set_adapter(["p", "q"])
    close(model.first(x), 0.5 * g(-x + 4) + 7 * x)
    model.set_adapter(["q", "p"])
    close(model.first(x), 3 * (0.5 * f(-(2 * x + 1) + 4) + 7 * (2 * x + 1)) + 5 * x)
    model.set_adapter("p")
    close(model.first(x), g(x))


class Pair(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return super().forward(x) * scale


class Loose(nn.Linear):
    """Its signature does not name its input."""

    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, *kwargs.values())


class Constant(nn.Module):
    """It takes no input."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return self.value


def test_layers_called_by_keyword() -> None:
    torch.manual_seed(0)
    model, ids = Keywords(), torch.tensor([[1, 2, 8]])
    plain = run(model, {"input_ids": ids})
    lora(model, ["table", "linear", "loose"], modules_to_save=["constant"])
    active = run(model, {"input_ids": ids})
    far(active, plain)
    model.merge_adapter()
    close(run(model, {"input_ids": ids}), active)


def test_a_layer_called_with_further_arguments() -> None:
    torch.manual_seed(0)
    model, x = Keywords(), torch.randn(2, 4)
    plain = model.pair(x, 2.0).detach()
    lora(model, ["pair"])
    adapter = model.pair.adapters["default"]
    expected = plain + 5 / 2 * x @ adapter.A.T @ adapter.B.T
    close(model.pair(x, 2.0), expected)
    close(model.pair(scale=2.0, x=x), expected)
    close(model.pair(x, scale=2.0), expected)


def test_a_trained_copy_of_a_module_called_without_its_first_argument() -> None:
    """BERT's embeddings take ids or vectors, both by keyword."""
    model, inputs = models.bert()
    vectors = model.bert.embeddings.word_embeddings(inputs["input_ids"]).detach()
    expected = run(model, {"inputs_embeds": vectors})
    config = LoraConfig(target_modules=["query"], modules_to_save=["embeddings"])
    get_peft_model(model, config)
    assert same_bits(run(model, {"inputs_embeds": vectors}), expected)
    randomise(model)
    far(run(model, {"inputs_embeds": vectors}), expected)


def test_a_list_of_modules_is_never_called_so_a_copy_of_it_is_refused() -> None:
    model, _ = models.bert()
    model.extra = nn.ModuleList([nn.Linear(1, 1)])
    with pytest.raises(TargetError, match=r"^extra is a ModuleList, which is never called"):
        get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=["extra"]))
    assert not any(isinstance(module, sites.AnySite) for module in model.modules())


def test_a_module_with_adapters_of_its_own_is_refused() -> None:
    for value in (["mine"], nn.ModuleList([nn.Linear(1, 1)])):
        model, inputs = models.mlp()
        model.second.adapters = value
        before, expected = list(model.state_dict()), run(model, inputs)
        with pytest.raises(TargetError, match=r"second \(Linear\) has something called `adapters` of its own"):
            get_peft_model(model, LoraConfig(target_modules=["first", "second"]))
        assert type(model.first) is nn.Linear
        assert list(model.state_dict()) == before
        assert same_bits(run(model, inputs), expected)
        lora(model, ["first"])  # elsewhere in the model it does not matter
        model.unload()
        assert model.second.adapters is value


# ------------------------------------------------------------------------- weights that are read, not called


def folded(model: nn.Module, original: nn.Module) -> nn.Module:
    """The oracle: the original with W + s B A written into its weights and trained biases into its biases.

    In the output projection of an attention that is itself a target it is 2 s, as in HF PEFT.
    """
    oracle = copy.deepcopy(original)
    with torch.no_grad():
        for name, module in oracle.named_modules():
            here = model.get_submodule(name)
            if not isinstance(here, sites.AnySite):
                continue
            adapter, attention = here.adapters["default"], isinstance(module, nn.MultiheadAttention)
            if hasattr(adapter, "A"):
                parent = model.get_submodule(name.rpartition(".")[0])
                twice = isinstance(parent, nn.MultiheadAttention) and isinstance(parent, sites.AnySite)
                s = 5 / 2 * (2 if twice else 1)
                (module.in_proj_weight if attention else module.weight).add_(s * adapter.B @ adapter.A)
            if getattr(adapter, "bias", None) is not None:
                (module.in_proj_bias if attention else module.bias).copy_(adapter.bias.value)
    return oracle


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fast paths that were taken."""
    taken: list[str] = []
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        real = getattr(torch, name)

        def spy(*args: Any, name: str = name, real: Any = real) -> Any:
            taken.append(name)
            return real(*args)

        monkeypatch.setattr(torch, name, spy)
    return taken


MASK = torch.tensor([[False] * 5, [False, False, False, True, True]])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # PyTorch's own encoder uses them
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(
    "settings",
    [{"target_modules": [name]} for name in ("self_attn", "out_proj", "linear1", "linear2", "head")]
    + [{"target_modules": "all-linear"}, {"target_modules": ["linear1"], "bias": "all"}],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_transformer_encoder(settings: dict[str, Any], masked: bool, fast: list[str]) -> None:
    """On the fast path (eval, no_grad), beside it (eval, gradients) and in training; a mask makes nested tensors."""
    model, inputs = models.encoder()
    original = copy.deepcopy(model)
    if masked:
        inputs = {**inputs, "src_key_padding_mask": MASK}
    settings = dict(settings)
    lora(model, settings.pop("target_modules"), **settings)
    oracle = folded(model, original)
    y = run(model, inputs)
    assert fast == ["_transformer_encoder_layer_fwd"] * 2
    close(y, run(oracle, inputs))
    far(y, run(original, inputs))
    real = ~MASK if masked else torch.ones(2, 5, dtype=torch.bool)  # what lies under the mask differs between paths
    for training in (False, True):
        model.train(training)
        oracle.train(training)
        with torch.enable_grad():
            close(model(**inputs)[real], oracle(**inputs)[real])
    model.eval().merge_adapter()
    close(run(model, inputs), y)


def test_trained_copies_inside_a_transformer_encoder() -> None:
    """The fast path reads norms and linear layers; trained copies of them must act there."""
    model, inputs = models.encoder()
    original = copy.deepcopy(model)
    get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=["head"], modules_to_save=["linear1", "norm2"]))
    assert same_bits(run(model, inputs), run(original, inputs))
    randomise(model)
    with torch.no_grad():
        for name in ("linear1", "norm2"):
            for theirs, ours in zip(original.encoder.layers, model.encoder.layers, strict=True):
                adapter = ours.get_submodule(name).adapters["default"]
                theirs.get_submodule(name).load_state_dict(adapter.replacement.state_dict())
        head = model.head.adapters["default"]
        original.head.weight += head.B @ head.A
    y = run(model, inputs)
    close(y, run(original, inputs))
    model.merge_adapter()
    close(run(model, inputs), y)


class Attention(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **settings)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        return self.attn(x, other, other, need_weights=False)[0]


@pytest.mark.parametrize("settings", [{"batch_first": True}, {}, {"bias": False}, {"add_bias_kv": True}], ids=str)
@pytest.mark.parametrize("targets", [["attn"], ["out_proj"], ["attn", "out_proj"]], ids="-".join)
def test_multihead_attention(settings: dict[str, Any], targets: list[str], fast: list[str]) -> None:
    torch.manual_seed(0)
    model = Attention(**settings).eval()
    original, x, other = copy.deepcopy(model), torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    lora(model, targets)
    oracle = folded(model, original)
    y = run(model, {"x": x})
    assert bool(fast) == bool(settings.get("batch_first"))
    close(y, run(oracle, {"x": x}))
    far(y, run(original, {"x": x}))
    close(run(model, {"x": x, "other": other}), run(oracle, {"x": x, "other": other}))
    model(x).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.norm() > 0 for p in trained)
    model.merge_adapter()
    close(run(model, {"x": x}), y)
    model.unload()
    assert same_bits(run(model, {"x": x}), run(original, {"x": x}))


def test_attention_with_separate_projections_offers_its_output_projection_only() -> None:
    torch.manual_seed(0)
    model = Attention(kdim=6, vdim=6).eval()
    original, inputs = copy.deepcopy(model), {"x": torch.randn(3, 5, 8), "other": torch.randn(3, 5, 6)}
    with pytest.raises(TargetError, match="attn is a MultiheadAttention, which LoraConfig cannot adapt"):
        get_peft_model(model, LoraConfig(target_modules=["attn"]))
    lora(model, ["out_proj"])
    close(run(model, inputs), run(folded(model, original), inputs))


def test_transformer_decoder() -> None:
    """It has no fast path of its own, but its attentions have."""
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2).eval()
    original, inputs = copy.deepcopy(model), {"tgt": torch.randn(2, 4, 8), "memory": torch.randn(2, 5, 8)}
    lora(model, "all-linear", bias="all")
    close(run(model, inputs), run(folded(model, original), inputs))


@pytest.mark.parametrize("name", ["self_attn", "out_proj", "linear1"])
def test_dropout_is_refused_where_weights_are_read(name: str) -> None:
    model, inputs = models.encoder()
    before = run(model, inputs)
    with pytest.raises(TargetError, match=rf"{name} is never called.*dropout 0, not 0\.1"):
        get_peft_model(model, LoraConfig(target_modules=[name], lora_dropout=0.1))
    assert not any(isinstance(module, sites.AnySite) for module in model.modules())
    assert same_bits(run(model, inputs), before)


def test_what_cannot_be_folded_is_refused_where_weights_are_read() -> None:
    model, _ = models.encoder()
    layer = model.encoder.layers[0]
    with pytest.raises(TargetError, match=r"linear1 is never called: TransformerEncoderLayer reads .*foldable"):
        sites.check("linear1", layer.linear1, layer, Adapter())
    sites.check("head", model.head, model, Adapter())


def test_a_whole_attention_cannot_be_a_trained_copy() -> None:
    """Its weights are read one by one; its parent can be trained whole instead."""
    model, inputs = models.encoder()
    with pytest.raises(TargetError, match=r"self_attn is a MultiheadAttention"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["head"], modules_to_save=["self_attn"]))
    before = run(model, inputs)
    get_peft_model(model, LoraConfig(r=2, target_modules=["head"], modules_to_save=["layers.0"]))
    assert isinstance(model.encoder.layers[0].adapters["default"], TrainedCopy)
    assert same_bits(run(model, inputs), before)
    randomise(model)
    far(run(model, inputs), before)
