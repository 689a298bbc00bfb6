"""LoRA's starts that follow from data or from quantization: by their formulas, beside HF PEFT, saved and loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from battery import close, far, run, same_bits
from models import randomise
from safetensors.torch import save_file
from torch import Tensor

import trimtab
from trimtab import CheckpointError, ConfigError, CordaConfig, EvaConfig, LoraConfig, LoraGAConfig, PeftModel, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # HF PEFT's calls
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False"),
]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def batches(n: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 60, (2, 24), generator=generator)} for _ in range(n)]


def losses(model: Any) -> None:
    for batch in batches():
        model(**batch, labels=batch["input_ids"]).loss.backward()


def calls(model: Any) -> None:
    with torch.no_grad():
        for batch in batches():
            model(input_ids=batch["input_ids"][:1])


MORE = {"use_rslora": True, "rank_pattern": {"q_proj|c_fc": 2}, "alpha_pattern": {"v_proj|c_attn|fc1": 7}}
PREPARE: dict[str, Callable[[Any, Any, Any], None]] = {
    "corda": lambda library, model, config: library[0](model, config, lambda: calls(model)),
    "lora_ga": lambda library, model, config: library[1](model, config, lambda: losses(model)),
}
OURS = trimtab.preprocess_corda, trimtab.preprocess_loraga


def started(
    kind: str, build: Any = models.llama, targets: Any = TARGETS, **settings: Any
) -> tuple[Any, dict[str, Any], Tensor]:
    model, inputs = build()
    base = run(model, inputs)
    config = LoraConfig(init_lora_weights=kind, r=3, lora_alpha=5, target_modules=targets, **settings)
    PREPARE[kind](OURS, model, config)
    trimtab.get_peft_model(model, config)
    return model, inputs, base


def theirs(kind: str, build: Any, targets: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga

    model, inputs = build()
    config = peft.LoraConfig(init_lora_weights=kind, r=3, lora_alpha=5, target_modules=targets, **settings)
    PREPARE[kind]((preprocess_corda, preprocess_loraga), model, config)
    return peft.get_peft_model(model, config), inputs


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries take a randomised SVD, whose error would hide others."""

    def svd(M: Tensor, q: int = 6, niter: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        return U[:, :q], S[:q], Vh[:q].T

    monkeypatch.setattr(torch, "svd_lowrank", svd)


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("corda", {}, {"corda_config": peft.tuners.lora.config.CordaConfig()}),
    (
        "corda",
        {"corda_config": CordaConfig(corda_method="kpm"), "use_rslora": True},
        {"corda_config": peft.tuners.lora.config.CordaConfig(corda_method="kpm"), "use_rslora": True},
    ),
    *(
        (
            "lora_ga",
            {"lora_ga_config": LoraGAConfig(direction=direction, scale=scale)},
            {"lora_ga_config": peft.LoraGAConfig(direction=direction, scale=scale)},
        )
        for direction, scale in (("ArB2r", "stable"), ("A2rBr", "unit"), ("ArBr", "gd_scale"), ("ArB2r", "weight_svd"))
    ),
]


@pytest.mark.parametrize(("kind", "ours", "other"), CASES)
def test_starts_are_those_of_hf_peft(kind: str, ours: Any, other: Any, exact: None) -> None:
    """Up to the signs of singular vectors; the output is the base's."""
    model, inputs, base = started(kind, **ours)
    hf, _ = theirs(kind, models.llama, TARGETS, **other)
    close(run(model, inputs), base)
    torch.testing.assert_close(run(hf, inputs), base, rtol=1e-4, atol=1e-4)
    found = 0
    for name, module in hf.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            adapter = model.get_submodule(name).adapters["default"]
            assert adapter.scale == pytest.approx(module.scaling["default"])
            for own, other_ in ((adapter.A, module.lora_A), (adapter.B, module.lora_B)):
                expected = other_["default"].weight.detach().abs()
                torch.testing.assert_close(own.detach().abs(), expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
            found += 1
    assert found == 6


@pytest.mark.parametrize("kind", ["corda", "lora_ga"])
@pytest.mark.parametrize(
    ("build", "targets"), [(models.llama, TARGETS), (models.gpt2, ["c_attn", "c_fc"]), (models.opt, ["q_proj", "fc1"])]
)
@pytest.mark.parametrize("more", [{}, MORE])
def test_what_is_saved_is_an_ordinary_lora(kind: str, build: Any, targets: Any, more: Any, tmp_path: Path) -> None:
    model, inputs, base = started(kind, build, targets, **more)
    close(run(model, inputs), base)
    randomise(model, scale=0.05)
    active = run(model, inputs)
    far(active, base)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["init_lora_weights"], settings["r"]) == (True, 6)
    fresh, _ = build()
    PeftModel.from_pretrained(fresh, tmp_path)
    close(run(fresh, inputs), active)
    hf = peft.PeftModel.from_pretrained(build().model, tmp_path)
    torch.testing.assert_close(run(hf, inputs), active, rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    close(run(model, inputs), active)
    model.unload()
    assert same_bits(run(model, inputs), base)


def test_training_goes_on_from_a_checkpoint_in_the_same_model(tmp_path: Path) -> None:
    """A0 and B0 come back with A and B, of the rank that is trained."""
    model, inputs, _ = started("corda")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    randomise(model, scale=0.05)
    active = run(model, inputs)
    model.save_pretrained(tmp_path)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    randomise(model, scale=0.05, seed=9)
    trimtab.checkpoint.load_weights(model, tmp_path, "default")
    close(run(model, inputs), active)
    randomise(model, scale=0.05, seed=9)
    model.load_state_dict(state)
    close(run(model, inputs), active)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


def test_corda_by_its_formula() -> None:
    """W - s B0 A0 keeps W C but for its r largest parts, of which s B0 A0 C has all."""
    model, inputs = models.mlp()
    config = LoraConfig(init_lora_weights="corda", r=2, lora_alpha=3, target_modules=["second"])
    seen: list[Tensor] = []
    hook = model.second.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    trimtab.preprocess_corda(model, config, lambda: run(model, inputs))
    hook.remove()
    [x] = seen
    rows = x.flatten(0, -2) / x.max().abs()
    C = rows.T @ rows
    C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C))
    W = model.second.weight.detach()
    trimtab.get_peft_model(model, config)
    start = model.second.adapters["default"].start
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    torch.testing.assert_close(1.5 * start.B @ start.A @ C, U[:, :2] @ S[:2].diag() @ Vh[:2], rtol=1e-4, atol=1e-4)


def test_lora_ga_by_its_formula() -> None:
    model, inputs = models.mlp()
    weight = model.second.weight
    config = LoraConfig(init_lora_weights="lora_ga", r=2, lora_alpha=3, target_modules=["second"])

    def step() -> None:
        model(**inputs).square().sum().backward()

    model.train()
    model.second.weight.requires_grad_(True)
    step()
    G = weight.grad.clone()
    model.zero_grad()
    model.eval()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    trimtab.preprocess_loraga(model, config, lambda: (step(), step()))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    trimtab.get_peft_model(model, config)
    adapter = model.second.adapters["default"]
    _, S, Vh = torch.linalg.svd(G, full_matrices=False)
    U = torch.linalg.svd(G)[0]
    close((adapter.A @ Vh[:2].T).abs(), torch.eye(2))
    close(adapter.B.norm(dim=0), S[2:4] * len(G) ** 0.25 / 4)
    close((U[:, 2:4].T @ adapter.B).abs(), torch.diag(adapter.B.norm(dim=0)))


def test_a_start_from_data_must_be_found_first(tmp_path: Path) -> None:
    for kind, function in {"corda": "preprocess_corda", "lora_ga": "preprocess_loraga"}.items():
        config = LoraConfig(init_lora_weights=kind, target_modules=["q_proj"], r=2)
        with pytest.raises(ConfigError, match=f"has no start from data: call {function}"):
            trimtab.get_peft_model(models.llama().model, config)
    with pytest.raises(ConfigError, match="Closest: 'corda'"):
        trimtab.preprocess_corda(models.llama().model, LoraConfig(target_modules=["q_proj"]), lambda: None)
    config = LoraConfig(init_lora_weights="corda", target_modules=["q_proj"], r=2)
    with pytest.raises(ConfigError, match="run_model did not call"):
        trimtab.preprocess_corda(models.llama().model, config, lambda: None)
    config = LoraConfig(init_lora_weights="lora_ga", target_modules=["q_proj"], r=9)
    model = models.llama().model
    with pytest.raises(ConfigError, match=r"takes 2 r of the 16 singular vectors. Closest: r=8"):
        trimtab.preprocess_loraga(model, config, lambda: losses(model))
    hf, _ = theirs("corda", models.llama, TARGETS, corda_config=peft.tuners.lora.config.CordaConfig())
    hf.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="files are of a changed base, except those"):
        PeftModel.from_pretrained(models.llama().model, tmp_path)


# EVA


def test_eva_takes_the_principal_components_of_the_inputs() -> None:
    model, inputs = models.llama()
    base = run(model, inputs)
    config = LoraConfig(init_lora_weights="eva", r=3, target_modules=TARGETS, eva_config=EvaConfig(rho=1, tau=-1))
    trimtab.get_peft_model(model, config)
    seen: dict[str, Tensor] = {}
    data = [{**batches(1)[0], "attention_mask": torch.ones(2, 24)}]
    data[0]["attention_mask"][0, :5] = 0
    for name, module in model.named_modules():
        if "adapters" in module._modules:
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
    trimtab.initialize_lora_eva_weights(model, data)
    for path, x in seen.items():
        rows = x[data[0]["attention_mask"].bool()].double()
        Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:3]
        adapter = model.get_submodule(path).adapters["default"]
        close((adapter.A.double() @ Vh.T).abs(), torch.eye(3).double())
    assert len(seen) == 6
    assert same_bits(run(model, inputs), base)  # B is zero


@pytest.mark.parametrize("settings", [{"rho": 2.0}, {"rho": 1.5, "whiten": True, "adjust_scaling_factors": False}])
def test_eva_shares_out_ranks_as_hf_peft_does(settings: Any, tmp_path: Path, exact: None) -> None:
    """With whitening not where layers share their input: HF PEFT whitens such components twice."""
    targets = ["q_proj", "down_proj"] if "whiten" in settings else TARGETS
    data = [
        {**batch, "labels": torch.where(batch["input_ids"] % 3 == 0, -100, batch["input_ids"])} for batch in batches(1)
    ]
    model, inputs = models.llama()
    ours = {"init_lora_weights": "eva", "r": 3, "lora_alpha": 5, "target_modules": targets}
    trimtab.get_peft_model(model, LoraConfig(**ours, eva_config=EvaConfig(**settings)))
    trimtab.initialize_lora_eva_weights(model, data * 2)  # HF PEFT takes it a second time to see that it is enough
    hf = peft.get_peft_model(models.llama().model, peft.LoraConfig(**ours, eva_config=peft.EvaConfig(**settings)))
    peft.initialize_lora_eva_weights(hf, data, show_progress_bar=False)
    found = {name: module for name, module in hf.get_base_model().named_modules() if hasattr(module, "lora_A")}
    mine = {path: site.adapters["default"] for path, site in model._trunk.sites.items()}
    assert mine.keys() == found.keys()
    assert sum(len(adapter.A) for adapter in mine.values()) == 2 * 3 * len(targets)
    assert len({len(adapter.A) for adapter in mine.values()}) > 1
    for path, module in found.items():
        A = module.lora_A["default"].weight
        assert mine[path].scale == pytest.approx(module.scaling["default"])
        torch.testing.assert_close(mine[path].A.abs(), A.abs(), rtol=1e-3, atol=1e-3)
    randomise(model, scale=0.05)
    active = run(model, inputs)
    model.save_pretrained(tmp_path)
    fresh, _ = models.llama()
    PeftModel.from_pretrained(fresh, tmp_path)
    assert same_bits(run(fresh, inputs), active)
    theirs_again = run(peft.PeftModel.from_pretrained(models.llama().model, tmp_path), inputs)
    torch.testing.assert_close(theirs_again, active, rtol=1e-4, atol=1e-4)


def test_eva_wants_enough_tokens_and_its_own_adapter() -> None:
    model, _ = models.llama()
    trimtab.get_peft_model(model, LoraConfig(init_lora_weights="eva", r=3, target_modules=TARGETS))
    with pytest.raises(ConfigError, match="No batch has the 6 tokens"):
        trimtab.initialize_lora_eva_weights(model, [{"input_ids": torch.tensor([[4, 5, 6]])}])
    with pytest.raises(trimtab.AdapterError, match="no adapter with init_lora_weights='eva'"):
        trimtab.initialize_lora_eva_weights(model, batches(), "other")


# LoftQ


@pytest.mark.parametrize("build", [models.quantized4, models.quantized8])
def test_loftq_makes_up_for_what_quantization_lost(build: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    full = models.Quantized(torch.nn.Linear)
    save_file(full.state_dict(), tmp_path / "model.safetensors")
    tiny = build()
    model, inputs = tiny
    for name in ("first", "second"):
        weights.write(model.get_submodule(name), full.get_submodule(name).weight.detach())
        model.get_submodule(name).bias.data.copy_(full.get_submodule(name).bias)
    model.head.load_state_dict(full.head.state_dict())
    expected = run(full, inputs)
    plain = (run(model, inputs) - expected).norm()
    config = LoraConfig(init_lora_weights="loftq", r=16, lora_alpha=24, target_modules=["first", "second"])
    trimtab.get_peft_model(model, config)
    asked: list[str] = []
    keep = lambda _, name: bool(asked.append(name)) or name == "first"  # noqa: E731
    trimtab.replace_lora_weights_loftq(model, tmp_path, callback=keep)
    assert asked == ["first", "second"]
    lost = full.first.weight - weights.read(model.first)
    U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
    adapter = model.first.adapters["default"]
    close(1.5 * adapter.B @ adapter.A, U[:, :16] @ S[:16].diag() @ Vh[:16])
    assert not model.second.adapters["default"].B.any()  # taken back
    trimtab.replace_lora_weights_loftq(model, tmp_path)
    assert (run(model, inputs) - expected).norm() < plain
    with pytest.raises(ConfigError, match="holds no model"):
        trimtab.replace_lora_weights_loftq(model, tmp_path / "nowhere")


def test_loftq_is_for_quantized_layers() -> None:
    with pytest.raises(ConfigError, match="is not quantized, and LoftQ"):
        trimtab.get_peft_model(
            models.llama().model, LoraConfig(init_lora_weights="loftq", target_modules=["q_proj"], r=2)
        )
