"""Two processes train what one would: FSDP2's fully_shard and DistributedDataParallel, with gloo on the CPU.

Both processes start once, run every shape, and leave what they found in files.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import close, is_adapter, same_bits
from models import Tiny, output
from safetensors.torch import load_file
from test_integration import SHAPES, all_close, attach
from torch import Tensor, nn

from trimtab import MergeError, TargetError, kernels

STEPS = 2


class Blocks(nn.Module):
    """A head behind the last block's norm, whose weight lies in that block's unit."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def blocks() -> Tiny:
    torch.manual_seed(0)
    return Tiny(Blocks(), {"x": torch.randn(2, 5, 4)})


MODELS = {**SHAPES, "blocks": blocks}


def error(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A mean over rows, so that the mean over processes with a row each is the whole batch's."""
    return output(model, inputs).pow(2).mean()


def whole(value: Tensor) -> Tensor:
    gather = getattr(value, "full_tensor", None)
    return (gather() if gather else value).detach().clone()


def trained(model: nn.Module, inputs: dict[str, Tensor], mean: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Losses, the first step's gradients, and all parameters after a few steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    found: dict[str, Any] = {"losses": []}
    for step in range(STEPS):
        value = error(model, inputs)
        value.backward()
        found["losses"].append(mean(value.detach()).item())
        if step == 0:
            named = [(name.removeprefix("module."), p) for name, p in model.named_parameters()]
            found["gradients"] = {name: whole(p.grad) for name, p in named if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    found["parameters"] = {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}
    return found


def sharded(model: nn.Module) -> None:
    """Every block and then the model, as one does it for real."""
    from torch.distributed.fsdp import fully_shard

    for module in reversed(list(model.modules())):
        if type(module) is nn.ModuleList:
            for block in module:
                fully_shard(block)
    fully_shard(model)


def process(rank: int, folder: str) -> None:
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    kernels.FEW = 0  # as conftest.py has it in the process of the tests
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def mean(value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value / 2

    for name, build in MODELS.items():
        for how in ("fsdp", "ddp"):
            model, inputs = attach(build())
            own = {key: value[rank : rank + 1] for key, value in inputs.items()}
            runs: nn.Module = model
            if how == "fsdp":
                sharded(model)
            else:
                runs = nn.parallel.DistributedDataParallel(model)
            at = Path(folder) / f"{name}-{how}"
            model.save_pretrained(at / "start", is_main_process=rank == 0)
            found = trained(runs.train(), own, mean)
            model.save_pretrained(at / "end", is_main_process=rank == 0)
            if rank == 0:
                torch.save(found, at / "found")
            if (name, how) == ("llama", "fsdp"):
                refusals(model, own)
    dist.barrier()
    dist.destroy_process_group()


def refusals(model: Any, inputs: dict[str, Tensor]) -> None:
    """FSDP2 holds the parameters that it sharded: others in their place, or beside them, would be passed over."""
    before = output(model.eval(), inputs)
    with pytest.raises(MergeError, match="sharded"):
        model.merge_adapter()
    with pytest.raises(TargetError, match="sharded"):
        model.add_adapter("late", model.peft_config["default"])
    assert same_bits(output(model, inputs), before)


def test_two_processes_train_what_one_would(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    for name, build in MODELS.items():
        model, inputs = attach(build())
        base = {key: value.clone() for key, value in model.state_dict().items() if not is_adapter(key)}
        model.save_pretrained(tmp_path / name / "start")
        expected = trained(model.train(), inputs, lambda value: value)
        model.save_pretrained(tmp_path / name / "end")
        for how in ("fsdp", "ddp"):
            agree(tmp_path / f"{name}-{how}", tmp_path / name, expected, base)


def agree(at: Path, alone: Path, expected: dict[str, Any], base: dict[str, Tensor]) -> None:
    found = torch.load(at / "found")
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert all(is_adapter(key) for key in found["gradients"])
    all_close(found["gradients"], expected["gradients"])
    assert found["parameters"].keys() == expected["parameters"].keys()
    for key, value in found["parameters"].items():
        if is_adapter(key):
            close(value, expected["parameters"][key])
        else:
            assert same_bits(value, base[key])
    for moment in ("start", "end"):
        ours, theirs = (load_file(place / moment / "adapter_model.safetensors") for place in (at, alone))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            close(ours[key], value)
            assert moment == "end" or same_bits(ours[key], value)
