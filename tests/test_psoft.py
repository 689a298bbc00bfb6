"""PSOFT against its formula, and the signs of singular vectors that one machine or another may find."""

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_formulas import agrees, attached, skew, trained
from torch import Tensor

import trimtab
from trimtab import CheckpointError, ConfigError, PsoftConfig

FIRST: dict[str, Any] = {"r": 3, "target_modules": ["first"]}


def parts(W: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:3].sqrt().diag()
    return (Vh[:3], U[:, :3] @ root @ root) if kind == "psoft_init" else (root @ Vh[:3], U[:, :3] @ root)


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({}, 3 + 3 + 3),
        ({"ab_svd_init": "pissa_init", "psoft_alpha": 7}, 3 + 3 + 3),
        ({"psoft_mag_a": False}, 3 + 3),
        ({"psoft_orth": False, "psoft_mag_b": False}, 9 + 3),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 5}, 3 + 3 + 3),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 2, "cayley_neumann_eps": 0.1}, 3 + 3 + 3),
    ],
    ids=str,
)
def test_psoft_turns_the_main_directions(settings: dict[str, Any], numbers: int) -> None:
    model, inputs, own = attached(PsoftConfig(**FIRST, **settings))
    assert trained(model) == numbers
    R = own["first.weight"]
    if settings.get("psoft_orth", True):
        Q, eye = skew(R, 3), torch.eye(3)
        if "cayley_neumann_eps" in settings:
            assert Q.norm() > 0.1
            Q = 0.1 * Q / Q.norm()
        exact = (eye + Q) @ torch.linalg.inv(eye - Q)
        torch.testing.assert_close(exact @ exact.T, eye, rtol=1e-5, atol=1e-5)
        series = {2: eye + 2 * Q, 5: eye + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q}
        R = series[settings["num_cayley_neumann_terms"]] if "use_cayley_neumann" in settings else exact
    R = own.get("first.vector_b", torch.ones(3)).diag() @ R @ own.get("first.vector_a", torch.ones(3)).diag()
    W = model.first.weight.detach().clone()
    A, B = parts(W, settings.get("ab_svd_init", "psoft_init"))
    agrees(model, inputs["x"], inputs["x"] @ (W + B @ (R - torch.eye(3)) @ A).T + model.first.bias.detach())


def test_an_orthogonal_psoft_keeps_the_lengths_in_its_subspace() -> None:
    """With all of W in it, W keeps its singular values."""
    config = PsoftConfig(r=5, psoft_mag_a=False, psoft_mag_b=False, target_modules=["first"])
    model, _, _ = attached(config)
    before = torch.linalg.svdvals(model.first.weight.detach())
    weight = model.first.weight.detach().clone()
    model.merge_adapter()
    assert (model.first.weight - weight).norm() > 0.1
    torch.testing.assert_close(torch.linalg.svdvals(model.first.weight.detach()), before)


def test_other_signs_of_the_singular_vectors_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, _ = attached(PsoftConfig(**FIRST))
    expected = models.output(model, inputs)
    model.save_pretrained(tmp_path)
    found = torch.linalg.svd

    def svd(W: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = found(W, full_matrices=full_matrices)
        signs = torch.tensor([1.0, -1, -1, 1, -1])
        return U * signs, S, signs[:, None] * Vh

    monkeypatch.setattr(torch.linalg, "svd", svd)
    loaded: Any = trimtab.PeftModel.from_pretrained(models.mlp().model, tmp_path)
    torch.testing.assert_close(models.output(loaded, inputs), expected, rtol=1e-5, atol=1e-5)
    loaded.merge_adapter()
    torch.testing.assert_close(models.output(loaded, inputs), expected, rtol=1e-5, atol=1e-5)
    assert loaded.first.adapters["default"].start.A[1].dot(model.first.adapters["default"].start.A[1]) < 0


def test_a_file_without_the_signs_is_read(tmp_path: Path) -> None:
    """As HF PEFT writes it."""
    model, inputs, _ = attached(PsoftConfig(**FIRST))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    saved = load_file(file)
    start = "base_model.model.first.psoft_"
    assert set(saved) == {f"{start}{end}" for end in ("R.weight", "R.vector_a", "R.vector_b", "signs")}
    save_file({key: value for key, value in saved.items() if not key.endswith("signs")}, file)
    loaded = trimtab.PeftModel.from_pretrained(models.mlp().model, tmp_path)
    torch.testing.assert_close(models.output(loaded, inputs), models.output(model, inputs), rtol=0, atol=0)


def test_psoft_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ConfigError, match=r"one direction alone cannot be turned\. Closest: r=2"):
        PsoftConfig(r=1)
    with pytest.raises(ConfigError, match="bounds the series: set use_cayley_neumann=True"):
        PsoftConfig(cayley_neumann_eps=0.5)
    with torch.device("meta"):
        base = torch.nn.Sequential(torch.nn.Linear(5, 7))
    with pytest.raises(ConfigError, match="0 has no values yet, which PSOFT decomposes"):
        trimtab.get_peft_model(base, PsoftConfig(r=3, target_modules=["0"]))


@pytest.mark.parametrize(
    "other", [{"ab_svd_init": "pissa_init"}, {"psoft_svd": "lowrank"}, {"use_cayley_neumann": True}], ids=str
)
def test_a_psoft_of_another_meaning_does_not_take_the_place_of_one(other: dict[str, Any], tmp_path: Path) -> None:
    attached(PsoftConfig(**FIRST, **other))[0].save_pretrained(tmp_path)
    model, inputs, _ = attached(PsoftConfig(**FIRST))
    before = models.output(model, inputs)
    with pytest.raises(CheckpointError, match=r"cannot take the place of 'default'\. At first it differs in"):
        model.hotswap_adapter(tmp_path, "default")
    assert torch.equal(models.output(model, inputs), before)
