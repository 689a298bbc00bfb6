"""accelerate prepares a model with adapters, and adapters act under its hooks and on what it offloads."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from battery import close, far, run, same_bits
from models import Tiny
from safetensors.torch import load_file
from test_integration import EVERY_SHAPE, attach, gradients, second
from test_trainer import adapters
from torch import nn

from trimtab import LoraConfig, MergeError, PeftModel, PromptTuningConfig, TargetError, get_peft_model

# Its hooks, as every model on several devices has them (`device_map`): they replace forward on the instance


def hooked(build: Callable[..., Tiny]) -> Tiny:
    from accelerate import dispatch_model

    tiny = build()
    dispatch_model(tiny.model, {"": "cpu"}, force_hooks=True)
    return tiny


@EVERY_SHAPE
def test_adapters_act_under_hooks(build: Callable[..., Tiny]) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    expected = run(*attach(build()))
    tiny = hooked(build)
    before = run(*tiny)
    model, inputs = attach(tiny)
    assert same_bits(run(model, inputs), expected)
    gradients(model, inputs)
    remove_hook_from_submodules(model)  # which leaves the bound forward on the instance
    assert same_bits(run(model, inputs), expected)
    second(model)
    model.set_adapter("second")
    far(run(model, inputs), expected)
    model.delete_adapter("default")
    assert same_bits(run(model.unload(), inputs), before)
    assert same_bits(run(*attach(tiny)), expected)


def test_hooks_survive_detaching() -> None:
    model, inputs = attach(hooked(models.llama))
    active = run(model, inputs)
    close(run(model.merge_and_unload(), inputs), active)
    assert all(hasattr(module, "_hf_hook") for module in (model, model.model.layers[0].self_attn.q_proj))
    after: list[Any] = []
    model.model.layers[0].self_attn.q_proj._hf_hook.pre_forward = lambda module, *args, **kwargs: (
        after.append(module) or (args, kwargs)
    )
    run(model, inputs)
    assert after == [model.model.layers[0].self_attn.q_proj]


def test_adapters_on_an_offloaded_model(tmp_path: Path) -> None:
    """Its weights are on the meta device between calls, and PyTorch multiplies by meta tensors without complaint."""
    from accelerate import cpu_offload

    whole, inputs = attach(models.llama())
    expected = run(whole, inputs)
    whole.save_pretrained(tmp_path)
    model = models.llama().model
    cpu_offload(model, "cpu")
    with pytest.raises(TargetError, match="norm is offloaded"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    attach(Tiny(model, inputs))
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    assert same_bits(run(model, inputs), expected)
    gradients(model, inputs)
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"layers\.0\.self_attn\.q_proj: .* is offloaded"):
            verb()
    model.load_adapter(tmp_path, "loaded")
    model.set_adapter("loaded")
    assert same_bits(run(model, inputs), expected)
    close(run(model.unload(), inputs), run(models.llama().model, inputs))


def test_a_patched_forward_is_refused() -> None:
    """The adapter would never be called. Patching after attaching is fine: the patch then calls it."""
    model, inputs = models.llama()
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)
    with pytest.raises(TargetError, match=r"layers\.0\.self_attn\.q_proj has a forward of its own"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert not isinstance(model, PeftModel)
    del layer.forward
    model, _ = attach(Tiny(model, inputs), ["q_proj"])
    expected = run(model, inputs)
    own = layer.forward
    layer.forward = lambda x: own(x)
    assert same_bits(run(model, inputs), expected)
    assert same_bits(run(model.unload(), inputs), run(models.llama().model, inputs))


# Its Accelerator


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Any]]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def make(**settings: Any) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=True, **settings)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


@EVERY_SHAPE
def test_accelerate(build: Callable[..., Tiny], accelerator: Callable[..., Any], tmp_path: Path) -> None:
    plain, inputs = attach(build())
    expected = gradients(plain, inputs)
    plain.save_pretrained(tmp_path / "plain")
    model, _ = attach(build())
    helper = accelerator()
    trained = [p for p in model.parameters() if p.requires_grad]
    prepared, optimizer = helper.prepare(model, torch.optim.SGD(trained, lr=0.1))
    assert gradients(prepared, inputs).keys() == expected.keys()
    assert all(torch.equal(p.grad, expected[name]) for name, p in prepared.named_parameters() if name in expected)
    unwrapped = helper.unwrap_model(prepared)
    unwrapped.save_pretrained(
        tmp_path / "saved", is_main_process=helper.is_main_process, state_dict=helper.get_state_dict(prepared)
    )
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("saved", "plain"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    helper.save_state(str(tmp_path / "state"))
    optimizer.step()
    assert not torch.equal(adapters(model)[next(iter(expected))], adapters(plain)[next(iter(expected))])
    helper.load_state(str(tmp_path / "state"))
    assert all(torch.equal(value, adapters(plain)[name]) for name, value in adapters(model).items())


def test_accelerate_in_mixed_precision(accelerator: Callable[..., Any], tmp_path: Path) -> None:
    model, inputs = attach(models.llama())
    active = run(model, inputs)
    helper = accelerator(mixed_precision="bf16")
    prepared = helper.prepare(model)
    low = run(prepared, inputs)
    assert low.dtype is torch.float32
    assert not same_bits(low, active)
    assert (low - active).norm() < 0.05 * active.norm()
    assert same_bits(run(helper.unwrap_model(prepared, keep_fp32_wrapper=False), inputs), active)


def test_what_acts_on_the_model_s_input_survives_mixed_precision(accelerator: Callable[..., Any]) -> None:
    """accelerate puts a forward on the model itself, which is the site of such an adapter."""
    model, inputs = models.llama()
    base = run(model, inputs)
    get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    active = run(model, inputs)
    far(active, base)
    helper = accelerator(mixed_precision="bf16")
    prepared = helper.prepare(model)
    low = run(prepared, inputs)
    assert not same_bits(low, active)
    assert (low - active).norm() < 0.05 * active.norm()
    assert same_bits(run(helper.unwrap_model(prepared, keep_fp32_wrapper=False), inputs), active)
    helper.prepare(model)
    low = run(model.unload(), inputs)  # still wrapped
    assert not same_bits(low, base)
    assert (low - base).norm() < 0.05 * base.norm()


def test_a_model_in_mixed_precision_takes_no_adapter_on_its_input(accelerator: Callable[..., Any]) -> None:
    """It would be passed by. Adapters inside are reached as before."""
    model, inputs = models.llama()
    accelerator(mixed_precision="bf16").prepare(model)
    with pytest.raises(TargetError, match="The model has a forward of its own"):
        get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert not isinstance(model, PeftModel)
    low = run(model, inputs)
    far(run(*attach(Tiny(model, inputs))), low)
    del model.forward
    model.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.set_adapter("prompt")
    far(run(model, inputs), run(models.llama().model, inputs))
