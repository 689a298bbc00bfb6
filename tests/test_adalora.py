"""AdaLoRA: the paper's equations written out a second time, and its part in training under any loop."""

import copy
import pickle
from pathlib import Path
from typing import Any

import models
import numpy as np
import peft
import pytest
import torch
from battery import close, far, loss, run, same_bits
from models import Tiny, output, randomise
from torch import Tensor, nn

import trimtab
from trimtab import AdaLoraConfig, CheckpointError, ConfigError, get_peft_model

STEPS = 14

# HF PEFT asks transformers for something deprecated, and takes AdaLoRA's rank_pattern for LoRA's at first.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape"),  # a rank of 0
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]


def small(**settings: Any) -> AdaLoraConfig:
    given = {"init_r": 4, "target_r": 2, "total_step": STEPS, "tinit": 3, "tfinal": 4, "deltaT": 2, "lora_alpha": 6}
    return AdaLoraConfig(**{**given, "target_modules": ["first", "second"], **settings})


def adapters(model: Any) -> dict[str, Any]:
    return {name: model.get_submodule(name).adapters["default"] for name in ("first", "second")}


def step(model: Any, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer, penalty: bool = True) -> None:
    """One step of a loop written by hand."""
    optimizer.zero_grad()
    total = loss(model.train(), inputs)
    term = model.penalty() if penalty else None
    (total if term is None else total + term).backward()
    optimizer.step()


def test_the_formula() -> None:
    """y = W x + b + s P diag(e) Q x, s = alpha / init_r; r (in + out + 1) parameters per site; merged the same."""
    model, inputs = models.mlp()
    get_peft_model(model, small())
    randomise(model)
    x, own = inputs["x"], adapters(model)["first"]
    assert (own.P.shape, own.E.shape, own.Q.shape) == ((7, 4), (4, 1), (4, 5))
    weight = model.first.weight + 6 / 4 * own.P @ torch.diag(own.E[:, 0]) @ own.Q
    expected = x @ weight.T + model.first.bias
    close(model.first(x), expected)
    assert model.get_nb_trainable_parameters()[0] == 4 * (5 + 7 + 1) + 4 * (7 + 6 + 1)
    model.merge_adapter()
    close(model.first.weight, weight)


def test_scores_budget_and_masks_are_the_papers() -> None:
    """Equations 7 to 12 in numpy, fed with the weights and gradients of every step."""
    model, inputs = models.mlp()
    config = small()
    b1, b2, t0, tf, every, T = 0.85, 0.85, 3, 4, 2, STEPS
    get_peft_model(model, config)
    own = adapters(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    smooth: dict[Any, Any] = {}
    unsure: dict[Any, Any] = {}
    unmasked: dict[Any, Any] = {}
    handle = optimizer.register_step_post_hook(  # runs before the hook for all optimizers
        lambda *_: unmasked.update(
            {(n, part): getattr(own[n], part).detach().numpy().copy() for n in own for part in "PEQ"}
        )
    )
    final, seen = None, []
    for t in range(1, STEPS + 1):
        step(model, inputs, optimizer)
        if final is None:
            for name, adapter in own.items():
                for part in "PEQ":
                    w, g = unmasked[name, part], getattr(adapter, part).grad.numpy()
                    sensitivity = np.abs(w * g)
                    before = smooth.get((name, part), np.zeros_like(w))
                    smooth[name, part] = b1 * before + (1 - b1) * sensitivity
                    off = np.abs(sensitivity - smooth[name, part])
                    unsure[name, part] = b2 * unsure.get((name, part), np.zeros_like(w)) + (1 - b2) * off
                    state = optimizer.state[getattr(adapter, part)]
                    np.testing.assert_allclose(state["adalora_sensitivity"], smooth[name, part], rtol=1e-5)
                    np.testing.assert_allclose(state["adalora_uncertainty"], unsure[name, part], rtol=1e-5)
        expected = {n: unmasked[n, "E"] for n in own}
        if final is not None or (t > t0 and t % every == 0) or t == T - tf:
            if final is None:
                s = {key: smooth[key] * unsure[key] for key in smooth}
                S = {n: s[n, "E"][:, 0] + s[n, "P"].mean(axis=0) + s[n, "Q"].mean(axis=1) for n in own}
                budget = 4 + (8 - 4) * max(0, 1 - (t - t0) / (T - tf - t0)) ** 3
                threshold = sorted(np.concatenate(list(S.values())))[-int(budget)]
                kept = {n: S[n] >= threshold for n in own}
                seen.append(sum(int(row.sum()) for row in kept.values()))
                final = kept if t >= T - tf else None
            expected = {n: unmasked[n, "E"] * kept[n][:, None] for n in own}
        for name, adapter in own.items():
            np.testing.assert_array_equal(adapter.E.detach().numpy(), expected[name])
    handle.remove()
    assert seen == [6, 4, 4, 4]  # t = 4, 6, 8, 10: 4 + 4 (6/7)^3 = 6.5, 4 + 4 (4/7)^3 = 4.7, 4 + 4 (2/7)^3 = 4.1, 4
    assert model.peft_config["default"].rank_pattern == {f"{n}.lora_E": final[n].tolist() for n in own}
    assert len({int(row.sum()) for row in final.values()}) == 2  # else nothing was adaptive about it


def test_the_penalty_reaches_the_loss_of_the_model() -> None:
    """In training; evaluation reports the task's loss."""
    model, inputs = models.bert()
    labels = torch.tensor([0, 2])
    base = model(**inputs, labels=labels).loss.item()
    get_peft_model(model, small(target_modules=["query", "value"], orth_reg_weight=0.3))
    sites = [module.adapters["default"] for module in model.modules() if "adapters" in module._modules]
    norms = []
    for own in sites:
        for vectors in (own.P.T, own.Q):
            gram = (vectors @ vectors.T).detach().numpy()
            norms.append(np.sqrt(((gram - np.eye(4)) ** 2).sum()))
    assert len(norms) == 2 * 2 * 2
    assert model.eval()(**inputs, labels=labels).loss.item() == pytest.approx(base)
    assert model.train()(**inputs, labels=labels).loss.item() == pytest.approx(base + 0.3 * np.mean(norms))
    model(**inputs, labels=labels).loss.backward()
    assert all(own.P.grad.any() and own.Q.grad.any() for own in sites)  # e is zero yet: all of it is the penalty's
    with model.disable_adapter():
        assert model(**inputs, labels=labels).loss.item() == pytest.approx(base)


def test_a_penalty_that_is_in_no_loss_is_told() -> None:
    model, inputs = models.mlp()
    get_peft_model(model, small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match=r"add model\.penalty\(\) to your loss"):
        step(model, inputs, optimizer, penalty=False)
    step(model, inputs, optimizer)


def test_other_optimizers_and_frozen_adapters_do_not_count() -> None:
    model, inputs = models.mlp()
    get_peft_model(model, small())
    other = nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    torch.optim.SGD(other.parameters()).step()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step(model, inputs, optimizer)
    assert optimizer.state[adapters(model)["first"].E]["adalora_step"] == 1
    model.add_adapter("plain", trimtab.LoraConfig(r=2, target_modules=["first"]))
    model.set_adapter("plain")
    assert model.penalty() is None
    optimizer.step()
    assert optimizer.state[adapters(model)["first"].E]["adalora_step"] == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_goes_on_alone(copied: Any) -> None:
    model, inputs = models.mlp()
    get_peft_model(model, small())
    other = copied(model)
    optimizer = torch.optim.Adam(other.parameters(), lr=0.05)
    for _ in range(STEPS):
        step(other, inputs, optimizer)
    assert other.peft_config["default"].rank_pattern is not None
    assert model.peft_config["default"].rank_pattern is None
    assert not adapters(model)["first"].E.any()


def rows(count: int = 12) -> list[dict[str, Tensor]]:
    inputs = models.bert().inputs
    return [{"input_ids": inputs["input_ids"][i % 2], "labels": torch.tensor(i % 2)} for i in range(count)]


def train(model: Any, folder: Path, trainer: Any = None, resume: Any = None, **settings: Any) -> Any:
    import transformers

    given = {
        "per_device_train_batch_size": 2, "max_steps": STEPS, "learning_rate": 0.05, "save_strategy": "no", "seed": 0,
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "logging_steps": 1,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(output_dir=str(folder), **{**given, **settings})
    made = (trainer or transformers.Trainer)(model=model, args=arguments, train_dataset=rows())
    made.remove_callback(transformers.PrinterCallback)
    made.train(resume_from_checkpoint=resume)
    return made


def bert(**settings: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(models.bert().model, small(target_modules=["query", "dense"], **settings))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_plain_trainer_prunes_to_the_target(tmp_path: Path, accumulate: int) -> None:
    """No subclass, no callback, no call by hand; a step is a step of the optimizer, whatever is accumulated."""
    model = bert(orth_reg_weight=10.0)
    before = model.penalty().item()
    done = train(model, tmp_path, gradient_accumulation_steps=accumulate)
    pattern = model.peft_config["default"].rank_pattern
    assert pattern is not None
    assert sum(sum(kept) for kept in pattern.values()) == 2 * len(pattern)
    assert len({sum(kept) for kept in pattern.values()}) > 1
    assert done.state.log_history[0]["loss"] == pytest.approx(before, rel=0.3)  # 10 times 2, and a loss near 1
    assert model.penalty().item() < before


def test_resuming_is_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """From before the final choice and from after it, with weights, scores, moments and the step."""
    whole = bert()
    train(whole, tmp_path / "whole", save_strategy="steps", save_steps=4)
    for at in (4, 12):
        resumed = bert()
        train(resumed, tmp_path / "again", trimtab.Trainer, str(tmp_path / "whole" / f"checkpoint-{at}"))
        assert resumed.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern
        inputs = models.bert().inputs
        close(run(resumed.eval(), inputs), run(whole.eval(), inputs))


PRUNED = {
    "llama": ["q_proj", "down_proj"], "bert": ["query", "output.dense"], "t5": ["q", "wo"], "gpt2": ["c_attn", "c_fc"],
    "opt": ["q_proj", "fc2"], "vit": ["v_proj", "projection"],
}  # fmt: skip


def pruned(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A model after its final choice, in which one site lost all of its triplets, with weights of some size."""
    model, inputs = models.TRANSFORMERS[name]()
    torch.manual_seed(0)
    get_peft_model(model, small(target_modules=PRUNED[name], orth_reg_weight=0))
    randomise(model, scale=0.8)
    made = model._trunk.adapters("default")
    pattern = {
        f"{path}.lora_E": [i == n % 3 or (i == 3 and n % 2 == 0) if n != 1 else False for i in range(4)]
        for n, path in enumerate(made)
    }
    model.peft_config["default"].rank_pattern = pattern
    with torch.no_grad():
        for path, own in made.items():
            own.E *= torch.tensor(pattern[f"{path}.lora_E"])[:, None]
    return model, inputs


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_ranks_load_here_and_in_hf_peft(name: str, tmp_path: Path) -> None:
    model, inputs = pruned(name)
    expected = run(model, inputs)
    far(expected, run(models.TRANSFORMERS[name]().model, inputs))
    model.save_pretrained(tmp_path)
    fresh = trimtab.PeftModel.from_pretrained(models.TRANSFORMERS[name]().model, tmp_path)
    ranks = {path: own.E.shape[0] for path, own in fresh._trunk.adapters("default").items()}
    assert ranks == {key[:-7]: sum(kept) for key, kept in model.peft_config["default"].rank_pattern.items()}
    assert 0 in ranks.values()
    close(run(fresh, inputs), expected)
    theirs = peft.PeftModel.from_pretrained(models.TRANSFORMERS[name]().model, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(output(theirs, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PRUNED)
def test_what_hf_peft_pruned_loads_here(name: str, tmp_path: Path) -> None:
    base, inputs = models.TRANSFORMERS[name]()
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=8, lora_alpha=6, target_modules=PRUNED[name], fan_in_fan_out=name == "gpt2"
    )
    theirs = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.add_(0.8 * torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=0.01)
    for t in range(1, 9):
        optimizer.zero_grad()
        (output(theirs, inputs) ** 2).sum().backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(t)
    theirs.eval().save_pretrained(tmp_path)
    ours = trimtab.PeftModel.from_pretrained(models.TRANSFORMERS[name]().model, tmp_path)
    assert sum(own.E.shape[0] for own in ours._trunk.adapters("default").values()) == 2 * len(
        ours._trunk.adapters("default")
    )
    with torch.no_grad():
        torch.testing.assert_close(output(theirs, inputs), output(ours, inputs), rtol=1e-4, atol=1e-4)


def test_an_untrained_adapter_goes_both_ways(tmp_path: Path) -> None:
    """Without a rank pattern, and with a convolution."""
    settings: dict[str, Any] = {"target_modules": ["plane", "head"], "init_r": 3, "target_r": 1, "total_step": 5}
    ours, inputs = models.convolutions()
    get_peft_model(ours, AdaLoraConfig(**settings))
    randomise(ours)
    expected = run(ours, inputs)
    ours.save_pretrained(tmp_path)

    def plain() -> Tiny:
        tiny = models.convolutions()
        tiny.model.plane.padding_mode = "zeros"  # HF PEFT pads with zeros whatever the layer does
        return tiny

    ours.plane.padding_mode = "zeros"
    expected = run(ours, inputs)
    theirs = peft.PeftModel.from_pretrained(plain().model, tmp_path).eval()
    close(run(theirs, inputs), expected)
    theirs.save_pretrained(tmp_path / "back")
    close(run(trimtab.PeftModel.from_pretrained(plain().model, tmp_path / "back"), inputs), expected)


def test_weights_go_into_an_attached_adapter_whatever_its_stage(tmp_path: Path) -> None:
    """A checkpoint from after the final choice into a full adapter, and one from before it into a pruned state."""
    from trimtab import checkpoint

    model, inputs = models.mlp()
    get_peft_model(model, small(orth_reg_weight=0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for t in range(1, STEPS + 1):
        step(model, inputs, optimizer)
        if t == 5:
            model.save_pretrained(tmp_path / "early")
            early = run(model.eval(), inputs)
    late, pattern = run(model.eval(), inputs), model.peft_config["default"].rank_pattern
    model.save_pretrained(tmp_path / "late")
    checkpoint.load_weights(model, tmp_path / "early", "default")
    assert model.peft_config["default"].rank_pattern is None
    assert same_bits(run(model, inputs), early)
    checkpoint.load_weights(model, tmp_path / "late", "default")
    assert model.peft_config["default"].rank_pattern == pattern
    assert adapters(model)["first"].E.shape == (4, 1)
    close(run(model, inputs), late)
    plain, _ = models.mlp()
    get_peft_model(plain, trimtab.LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(CheckpointError, match="holds ADALORA; the adapter 'default' is LORA"):
        checkpoint.load_weights(plain, tmp_path / "late", "default")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_step": None}, "total_step is needed: the number of optimizer steps"),
        ({"tinit": 10}, "Closest: total_step=15"),
        ({"target_r": 5}, "target_r is init_r=4 at most, not 5"),
        ({"r": 4}, "r is a setting of HF PEFT's AdaLoraConfig that trimtab does not offer"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"total_steps": 3}, "Did you mean 'total_step'"),
    ],
)
def test_nonsense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_r": 6}, r"first has a rank of 5 at most: 6 is too much. Closest: 5"),
        ({"rank_pattern": {"frist.lora_E": [True] * 4}}, "Did you mean 'first.lora_E'"),
        ({"rank_pattern": {"first.lora_E": [True] * 3}}, "of 3 triplets of first which to keep; init_r makes 4"),
    ],
)
def test_nonsense_for_this_model(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(models.mlp().model, small(**settings))
