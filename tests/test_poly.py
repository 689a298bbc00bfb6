"""Poly: each task's mixture of shared LoRAs, against its formula and HF PEFT."""

import copy
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from battery import close, far, run
from models import Tiny, randomise
from torch import Tensor

from trimtab import AdapterError, ConfigError, LoraConfig, MergeError, PeftModel, PolyConfig, get_peft_model

TASKS = torch.tensor([2, 0])
SETTINGS: dict[str, Any] = {"r": 3, "n_tasks": 3, "n_skills": 2, "target_modules": ["q_proj", "down_proj"]}


def attached(tiny: Tiny, **settings: Any) -> Any:
    torch.manual_seed(5)
    model = get_peft_model(tiny.model, PolyConfig(**{**SETTINGS, **settings}))
    randomise(model)
    return model


def mixture(adapter: Any, task: int) -> Tensor:
    """D of y = W x + D x for a row of this task, in loops."""
    A, B = adapter.A.detach().double(), adapter.B.detach().double()
    splits, skills, r = *A.shape[:2], A.shape[3]
    z = torch.sigmoid(adapter.logits[task].detach().double()).view(splits, skills)
    w = z / z.sum(1, keepdim=True)
    own_A = torch.cat([sum(w[q, s] * A[q, s] for s in range(skills)) for q in range(splits)])  # (in, r)
    own_B = torch.cat([sum(w[q, s] * B[q, s] for s in range(skills)) for q in range(splits)], 1)  # (r, out)
    return (own_A @ own_B).T / r


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_a_task_has_its_own_mixture(splits: int) -> None:
    tiny = models.llama()
    model = attached(tiny, n_splits=splits)
    site = model.model.layers[0].mlp.down_proj
    seen: dict[str, Tensor] = {}

    def see(_: Any, args: tuple[Tensor], y: Tensor) -> None:
        seen.update(x=args[0].detach().double(), y=y.detach())

    site.register_forward_hook(see)
    model(**tiny.inputs, task_ids=TASKS)
    x, W = seen["x"], site.weight.double()
    for row, task in enumerate(TASKS.tolist()):
        change = x[row] @ mixture(site.adapters["default"], task).T
        far(change, torch.zeros_like(change))
        close(seen["y"][row], (x[row] @ W.T + change).float())


def test_training_draws_how_much_of_each_skill() -> None:
    """z = sigmoid(logits + logit(u)) has the mean of a relaxed Bernoulli: P(z > 1/2) is sigmoid(logits)."""
    adapter = attached(models.llama()).model.layers[0].self_attn.q_proj.adapters["default"].train()
    with torch.no_grad():
        adapter.logits.copy_(torch.tensor([[0.0, 2.0], [0.0, 2.0], [0.0, 2.0]]))
        adapter.A.copy_(torch.eye(1).expand_as(adapter.A[:, :1]).repeat(1, 2, 1, 1))
        adapter.A[0, 1] *= 3
        torch.manual_seed(0)
        A, _ = adapter._mixed(torch.zeros(20000, dtype=torch.long))
    share = (A[:, 0, 0] - 1) / 2  # of skill 1 among the two: A is 1 (1 - share) + 3 share
    # It is above one half where logit(u1) + 2 > logit(u0): the difference of two logistic variables is above -2 with
    # P = 1 / (1 - q) + q log(q) / (1 - q)^2, q = exp(-2).
    q = math.exp(-2)
    expected = 1 / (1 - q) + q * math.log(q) / (1 - q) ** 2
    assert abs((share > 0.5).double().mean().item() - expected) < 0.01
    assert 0 < share.min() < share.max() < 1


def test_each_row_draws_for_itself() -> None:
    tiny = models.llama()
    model = attached(tiny).train()
    ids = tiny.inputs["input_ids"][:1].repeat(2, 1)
    y = model(input_ids=ids, task_ids=torch.zeros(2, dtype=torch.long)).logits
    far(y[0], y[1])
    model.eval()
    y = model(input_ids=ids, task_ids=torch.zeros(2, dtype=torch.long)).logits
    close(y[0], y[1])


def test_one_task_needs_no_number_and_can_be_merged() -> None:
    tiny = models.llama()
    model = attached(tiny, n_tasks=1, n_splits=2)
    active = run(model, tiny.inputs)
    site = model.model.layers[1].self_attn.q_proj
    expected = site.weight.double() + mixture(site.adapters["default"], 0)
    merged = model.train().merge_and_unload().eval()  # what training draws has no place in a weight
    close(merged.model.layers[1].self_attn.q_proj.weight, expected.float())
    close(run(merged, tiny.inputs), active)


def test_several_tasks_cannot_be_merged() -> None:
    with pytest.raises(MergeError, match="acts on each row by its task"):
        attached(models.llama()).merge_adapter()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, r"Give task_ids \(2,\).*got None"),
        (torch.tensor([0, 1, 2]), r"Give task_ids \(2,\).*got \(3,\)"),
        (torch.tensor([0, 3]), "from 0 to 2 for each row; got"),
        (torch.tensor([0, -1]), "from 0 to 2 for each row; got"),
        (torch.tensor([[0], [1]]), "from 0 to 2 for each row; got"),
    ],
)
def test_wrong_tasks_are_refused(given: Tensor | None, said: str) -> None:
    tiny = models.llama()
    model = attached(tiny)
    model(**tiny.inputs, task_ids=TASKS)  # what an earlier call said is not remembered
    with pytest.raises(AdapterError, match=said):
        model(**tiny.inputs, task_ids=given)


def test_parts_must_divide_both_sides() -> None:
    with pytest.raises(ConfigError, match=r"down_proj has 24 inputs and 16 outputs, which n_splits=3 .*Closest: 2"):
        attached(models.llama(), n_splits=3, target_modules=["down_proj"])


@pytest.fixture
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def theirs(tiny: Tiny, **settings: Any) -> Any:
    made = peft.get_peft_model(tiny.model, peft.PolyConfig(**{**SETTINGS, **settings})).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "poly_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


ARCHITECTURES = {
    "llama": (models.llama, ["q_proj", "down_proj"], 2),
    "bert": (models.bert, ["query", "output.dense"], 4),
    "opt": (models.opt, ["v_proj"], 1),
    "t5": (models.t5, ["q", "wo"], 2),
    "vit": (models.vit, ["q_proj", "fc2"], 1),
}


@pytest.mark.usefixtures("_quiet_peft")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hf_peft_s_adapters_both_ways(name: str, tmp_path: Path) -> None:
    build, targets, splits = ARCHITECTURES[name]
    tiny = build()
    plain = copy.deepcopy(tiny.model)
    other = theirs(tiny, target_modules=targets, n_splits=splits)
    other.save_pretrained(tmp_path / "hf")
    ours = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "hf")
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    other, back = other.base_model, back.base_model  # what is around them takes no task_ids
    tiny = Tiny(tiny.model, {**tiny.inputs, "task_ids": TASKS})
    if name == "t5":  # HF PEFT tells every layer, ours the encoder and the root
        generated = [
            model.generate(**{key: tiny.inputs[key] for key in ("input_ids", "task_ids")}, max_new_tokens=6)
            for model in (other, ours, back)
        ]
        assert torch.equal(generated[0], generated[1])
        assert torch.equal(generated[0], generated[2])
    expected = run(other, tiny.inputs)
    far(expected, run(plain, {key: value for key, value in tiny.inputs.items() if key != "task_ids"}))
    for model in (ours, back):
        torch.testing.assert_close(run(model, tiny.inputs), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_rows_and_tokens_in_one_dimension() -> None:
    """As OPT's feed-forward layers have them; HF PEFT's cannot."""
    tiny = models.opt()
    model = attached(tiny, target_modules=["fc2"])
    ids = tiny.inputs["input_ids"]
    both = run(model, {"input_ids": ids, "task_ids": TASKS})
    for row in range(2):
        close(both[row], run(model, {"input_ids": ids[row : row + 1], "task_ids": TASKS[row : row + 1]})[0])
    far(both, run(model, {"input_ids": ids, "task_ids": TASKS.flip(0)}))


def test_beams_keep_their_tasks() -> None:
    """In `generate` rows are repeated, and their tasks with them."""
    tiny = models.t5()
    model = attached(tiny, target_modules=["q", "wo"])
    ids = tiny.inputs["input_ids"]
    both = model.generate(input_ids=ids, task_ids=TASKS, num_beams=3, max_new_tokens=6)
    for row in range(2):
        own = {"input_ids": ids[row : row + 1], "task_ids": TASKS[row : row + 1]}
        alone = model.generate(**own, num_beams=3, max_new_tokens=6)
        length = min(both.shape[1], alone.shape[1])
        assert torch.equal(both[row, :length], alone[0, :length])


def test_beside_another_method_in_one_batch() -> None:
    tiny = models.llama()
    model = attached(tiny)
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["q_proj"]))
    randomise(model)
    ids = tiny.inputs["input_ids"].repeat(2, 1)
    tasks = torch.tensor([2, 0, 1, 1])
    mixed = model(input_ids=ids, task_ids=tasks, adapter_names=["default", "lora", "default", "__base__"]).logits
    model.set_adapter("default")
    alone = model(input_ids=ids, task_ids=tasks).logits
    close(mixed[[0, 2]], alone[[0, 2]])
    model.set_adapter("lora")
    close(mixed[1], model(input_ids=ids).logits[1])
