"""Every method on one decoder: compiled, checkpointed, quantized, in Trainer, generating with a cache and without."""

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from battery import close
from models import randomise
from torch import Tensor, nn

from trimtab import PeftConfig, get_peft_model, weights
from trimtab.methods import METHODS

LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {**LINEAR, "init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 2},
    "beft": LINEAR,
    "bitfit": {},
    "boft": {**LINEAR, "boft_block_size": 4},
    "bottleneck": {"reduction_factor": 4},
    "c3a": {**LINEAR, "block_size": 4},
    "compacter": {"reduction_factor": 4, "phm_dim": 2},
    "cpt": {"cpt_token_ids": [9, 7, 8], "task_type": "CAUSAL_LM"},
    "delora": {**LINEAR, "r": 4},
    "fourierft": {**LINEAR, "n_frequency": 100},
    "full": {},
    "glora": {**LINEAR, "r": 2},
    "gralora": {**LINEAR, "r": 4},
    "hira": {**LINEAR, "r": 2},
    "hra": {**LINEAR, "r": 2},
    "ia3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "lily": {**LINEAR, "r": 4, "stride_A": 2},
    "llama_adapter": {"adapter_len": 3},
    "ln_tuning": {},
    "loha": {**LINEAR, "r": 2},
    "lokr": {**LINEAR, "r": 2},
    "lora": {**LINEAR, "r": 4},
    "loreft": {"r": 2},
    "mam": {"num_virtual_tokens": 3, "encoder_hidden_size": 7, "reduction_factor": 4},
    "miss": {**LINEAR, "r": 5},
    "multitask_prompt_tuning": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "oft": {**LINEAR, "oft_block_size": 4},
    "p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 7, "task_type": "CAUSAL_LM"},
    "peanut": {**LINEAR, "r": 4, "depth": 1},
    "poly": {**LINEAR, "r": 2},
    "prefix_tuning": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "prompt_tuning": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "psoft": {**LINEAR, "r": 4},
    "pvera": {**LINEAR, "r": 4},
    "randlora": {**LINEAR, "r": 4, "randlora_alpha": 20},
    "road": {**LINEAR, "group_size": 4},
    "shira": {**LINEAR, "r": 4},
    "tinylora": {**LINEAR, "u": 6},
    "trainable_tokens": {"token_indices": IDS[0, 2:6].tolist()},
    "unilora": {**LINEAR, "theta_d_length": 100},
    "unipelt": {"num_virtual_tokens": 3, "r": 2, "reduction_factor": 4},
    "vblora": {**LINEAR, "r": 4, "num_vectors": 20, "vector_length": 8},
    "vera": {**LINEAR, "r": 4},
    "waveft": {**LINEAR, "n_frequency": 100},
}
every_method = pytest.mark.parametrize("name", METHODS)


def config(name: str) -> PeftConfig:
    return METHODS[name](**copy.deepcopy(SETTINGS[name]))


def base() -> Any:
    return models.llama(attention_bias=True).model  # BitFit wants biases


def adapted(name: str, model: Any) -> Any:
    torch.manual_seed(1)
    get_peft_model(model, config(name))
    randomise(model, scale=0.1)
    return model.eval()


def test_every_method_is_here() -> None:
    assert SETTINGS.keys() == METHODS.keys()


@every_method
def test_compiled(name: str) -> None:
    model = adapted(name, base())
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        torch._dynamo.reset()
        close(torch.compile(model, fullgraph=True, backend="eager")(input_ids=IDS).logits, expected)


@every_method
def test_checkpointed(name: str) -> None:
    """Outputs and gradients are those without checkpointing."""
    found = []
    for checkpointing in (False, True):
        model = adapted(name, base()).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append((loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.requires_grad}))
    (loss, plain), (again, checkpointed) = found
    close(again, loss)
    assert any(gradient.norm() > 0 for gradient in plain.values())
    for key, gradient in plain.items():
        close(checkpointed[key], gradient)


@every_method
def test_generates_with_and_without_a_cache_and_behind_padding(name: str) -> None:
    model = adapted(name, base())
    long = torch.randint(3, 60, (1, 7), generator=torch.Generator().manual_seed(1))
    short = torch.randint(3, 60, (1, 4), generator=torch.Generator().manual_seed(2))
    settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}

    def write(ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
        mask = torch.ones_like(ids) if mask is None else mask
        return model.generate(input_ids=ids, attention_mask=mask, **settings, **more)[:, ids.shape[1] :]

    alone = [write(ids) for ids in (long, short)]
    if name not in ("lily", "loreft", "unipelt"):
        # LoReFT edits the prompt's positions, and without a cache each token makes a new prompt; UniPELT's gates are
        # those of the prompt in the cache, and without one those of all that is there. So are Lily's routers'.
        assert torch.equal(write(long, use_cache=False), alone[0])
    both = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)])
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    if name not in ("lily", "unipelt"):  # gates and routers look at padding too
        assert torch.equal(write(both, mask), torch.cat(alone))
        right = torch.cat([short, torch.zeros(1, 3, dtype=torch.long)], 1)
        with torch.no_grad():
            padded = model(input_ids=torch.cat([long, right]), attention_mask=mask.flip(1)).logits
            close(padded[:1], model(input_ids=long).logits)
            close(padded[1:, :4], model(input_ids=short).logits)


@every_method
def test_trains_by_trainer(name: str, tmp_path: Path) -> None:
    model = base()
    stored = {key: value.clone() for key, value in model.state_dict().items()}
    get_peft_model(model, config(name))
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(6, 1)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2, learning_rate=0.01, report_to="none",
        disable_tqdm=True, save_strategy="no", use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    after = dict(model.named_parameters())
    assert any(not torch.equal(after[key], value) for key, value in before.items())
    model.unload()
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())


def quantized(bits: int) -> tuple[nn.Module, nn.Module]:
    """A Llama whose linear layers bitsandbytes holds in NF4 with double quantization or in int8, and its dense twin."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        attention_bias=True,
    )  # fmt: skip
    dense = transformers.LlamaForCausalLM(settings).eval()
    packed = copy.deepcopy(dense)
    for path, layer in list(packed.named_modules()):
        if not isinstance(layer, nn.Linear) or path == "lm_head":
            continue
        sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
        if bits == 4:
            new = bnb.nn.Linear4bit(*sizes, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
            new.support_avx512bf16_for_cpu = False
        else:
            new = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, threshold=6.0)
        new.load_state_dict(layer.state_dict())
        packed.set_submodule(path, new.to("cpu"))
        with torch.no_grad():
            dense.get_submodule(path).weight.copy_(weights.read(packed.get_submodule(path)))
    return packed.eval(), dense


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("bits", [4, 8])
@every_method
def test_on_a_quantized_base(name: str, bits: int) -> None:
    """Outputs and gradients are those on the dequantized weights, up to the rounding of bitsandbytes' kernels."""
    if name == "full":
        pytest.skip("packed weights cannot be trained whole: refused, and tested apart")
    packed, dense = quantized(bits)
    found = []
    for model in (packed, dense):
        adapted(name, model)
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        found.append((out.logits.detach(), {key: p.grad for key, p in model.named_parameters() if p.requires_grad}))
    (logits, gradients), (expected, others) = found
    assert gradients.keys() == others.keys()
    assert all(".adapters." in f".{key}" for key in gradients)
    tolerance = {4: 1e-3, 8: 0.05}[bits]  # int8 rounds the activations as well
    assert (logits - expected).norm() < tolerance * expected.norm()
    total = sum(float(g.square().sum()) for g in others.values())
    apart = sum(float((gradients[key] - g).square().sum()) for key, g in others.items())
    assert total > 0
    assert apart**0.5 < 4 * tolerance * total**0.5
