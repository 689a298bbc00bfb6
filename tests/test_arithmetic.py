"""Combined and converted adapters change weights as the formulas say, and what has no such change is refused."""

from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from battery import ALL_SMALL_CONFIGS, Case, Snapshot, close, run, same_bits
from models import Tiny, randomise
from peft.utils import merge_utils
from torch import Tensor, nn

import trimtab
from trimtab import (
    AdapterError,
    BitFitConfig,
    ConfigError,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    MergeError,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from trimtab.arithmetic import KINDS, TYPES, Rule


def adapted(*configs: PeftConfig, tiny: Any = models.mlp) -> tuple[Any, dict[str, Tensor]]:
    """A model with an adapter of each config, called a, b, c, all random."""
    model, inputs = tiny()
    get_peft_model(model, configs[0], "a")
    for name, config in zip("bcd", configs[1:], strict=False):
        model.add_adapter(name, config)
    randomise(model)
    return model, inputs


def lora(r: int = 2, *targets: str, **settings: Any) -> LoraConfig:
    return LoraConfig(r=r, target_modules=list(targets) or ["first", "second"], **{"lora_alpha": 5, **settings})


def weights(model: Any, name: str) -> dict[str, Tensor]:
    """The parameters of the model with this adapter in them."""
    model.merge_adapter([name])
    found = {key: value.detach().clone() for key, value in model.named_parameters() if ".adapters." not in f".{key}"}
    model.unmerge_adapter()
    return found


def changes(model: Any, name: str) -> dict[str, Tensor]:
    """merged - base, in float64, of the parameters that are in both."""
    base = {key: value.double() for key, value in model.named_parameters()}
    return {key: value.double() - base[key] for key, value in weights(model, name).items()}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


# ------------------------------------------------------------------------------------------------- sums, every method


def mergeable() -> list[Case]:
    """At grouped convolutions the methods that change weights are refused below, and those of parameters elsewhere."""
    cases = [case for case in ALL_SMALL_CONFIGS if "merge" not in case.skips and not grouped(case)]
    return [case for case in cases if not getattr(case.config, "target_parameters", None)]


def grouped(case: Case) -> bool:
    return any(getattr(module, "groups", 1) > 1 for module in case.tiny().model.modules())


@pytest.mark.parametrize("case", mergeable(), ids=lambda case: case.id)
def test_a_weighted_sum_of_any_method(case: Case, tmp_path: Path) -> None:
    model, inputs = case.tiny()
    get_peft_model(model, case.config)
    model.add_adapter("second", case.config)
    randomise(model)
    before = Snapshot.of(model, inputs)
    kept = model.add_weighted_adapter(["default", "second"], [1.4, -0.4], "sum")
    assert model.active_adapters == ["default"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum." in name)
    assert all(value == pytest.approx(1, abs=1e-6) for value in kept.values())
    assert same_bits(run(model, inputs), before.output)
    a, b = changes(model, "default"), changes(model, "second")
    expected = {key: 1.4 * a[key] - 0.4 * b[key] for key in a}
    assert any(value.abs().max() > 0.1 for value in expected.values())
    equal(changes(model, "sum"), expected)

    model.set_adapter("sum")
    acting = run(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(run(model, inputs), acting, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path, ["sum"])
    fresh = PeftModel.from_pretrained(case.tiny().model, tmp_path / "sum", is_trainable=True)
    torch.testing.assert_close(run(fresh, inputs), acting, rtol=1e-5, atol=1e-5)
    assert any(p.requires_grad for p in fresh.parameters())


@pytest.mark.parametrize("case", mergeable(), ids=lambda case: case.id)
def test_halves_of_one_adapter_are_that_adapter(case: Case) -> None:
    model, _ = case.tiny()
    get_peft_model(model, case.config)
    randomise(model)
    model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "same")
    equal(changes(model, "same"), changes(model, "default"))
    if case.id == "lora":  # and no larger
        assert model.first.adapters["same"].A.shape == model.first.adapters["default"].A.shape


@pytest.mark.parametrize("case", mergeable(), ids=lambda case: case.id)
def test_any_method_as_a_lora(case: Case) -> None:
    model, _ = case.tiny()
    get_peft_model(model, case.config)
    randomise(model)
    if case.id.startswith(("bitfit", "full", "ln_tuning", "trainable_tokens")):
        with pytest.raises(MergeError, match="nothing can be A and B of a LoRA"):
            model.convert_to_lora(1.0)
        return
    if case.id == "ia3-encoder":  # whose attention has a bias that LoRA does not train
        with pytest.raises(MergeError, match=r"self_attn: its in_proj_bias is changed"):
            model.convert_to_lora(1.0)
        return
    kept = model.convert_to_lora(1.0)
    assert model.peft_config["lora"].peft_type == "LORA"
    assert all(value == pytest.approx(1, abs=1e-6) for value in kept.values())
    equal(changes(model, "lora"), changes(model, "default"))


def test_a_sum_of_loras_by_the_formula() -> None:
    """Of other ranks, scales and modules; in weights, W + sum w s B A."""
    settings: list[dict[str, Any]] = [{}, {"use_rslora": True}, {"lora_alpha": 1}]
    model, inputs = adapted(
        lora(2, "first"), lora(3, "first", "second", **settings[1]), lora(1, "second", "head", **settings[2])
    )
    factors = {"a": 0.5, "b": -2.0, "c": 3.0}
    scales = {"a": 5 / 2, "b": 5 / 3**0.5, "c": 1.0}
    for type_ in ("linear", "cat"):
        model.add_weighted_adapter(list(factors), list(factors.values()), type_, type_)
        assert {path: len(model.get_submodule(path).adapters[type_].A) for path in ("first", "second", "head")} == {
            "first": 5, "second": 4, "head": 1
        }  # fmt: skip
        plain = models.mlp().model
        for path in ("first", "second", "head"):
            here = model.get_submodule(path).adapters
            for name in factors.keys() & here.keys():
                delta = factors[name] * scales[name] * here[name].B @ here[name].A
                plain.get_submodule(path).weight.data += delta.detach()
        model.set_adapter(type_)
        close(run(model, inputs), run(plain, inputs))


def test_ranks_that_add_up_to_more_than_the_matrix_has() -> None:
    model, _ = adapted(*[lora(3, "first")] * 3)
    model.add_weighted_adapter(["a", "b", "c"], [1, 1, -1], "sum")
    assert model.first.adapters["sum"].A.shape == (5, 5)
    a, b, c = (changes(model, name)["first.weight"] for name in "abc")
    torch.testing.assert_close(changes(model, "sum")["first.weight"], a + b - c, rtol=1e-5, atol=1e-5)


def test_on_a_half_precision_base_nothing_is_rounded_to_it() -> None:
    configs = [LoHaConfig(r=2, target_modules=["first"]), lora(2, bias="lora_only")]
    model, _ = adapted(*configs, tiny=lambda: Tiny(models.mlp().model.bfloat16(), {}))
    model.add_weighted_adapter(["a", "b"], [0.3, -0.7], "c")
    one, two, found = (model.first.adapters[name] for name in "abc")
    expected = 0.3 * one.delta((7, 5)) - 0.7 * 5 / 2 * two.B @ two.A
    torch.testing.assert_close(found.B @ found.A, expected, rtol=1e-5, atol=1e-5)
    bias = model.first._parameters["bias"].float()
    torch.testing.assert_close(found.bias.value, bias - 0.7 * (two.bias.value - bias), rtol=1e-6, atol=1e-6)


def test_on_a_4_bit_base() -> None:
    configs = [LoHaConfig(r=2, target_modules=["first"]), lora(2, "first")]
    model, _ = adapted(*configs, tiny=models.quantized4)
    model.add_weighted_adapter(["a", "b"], [0.3, -0.7], "c")
    one, two, found = (model.first.adapters[name] for name in "abc")
    expected = 0.3 * one.delta((128, 64)) - 0.7 * 5 / 2 * two.B @ two.A
    torch.testing.assert_close(found.B @ found.A, expected, rtol=1e-5, atol=1e-4)
    assert found.A.shape == (6, 64)


def test_the_lowest_rank_is_found_also_beside_large_weights() -> None:
    """LoHa of rank 1 is a matrix of rank 1, though merged - base is rounded where the base is large."""
    model, _ = adapted(LoHaConfig(r=1, target_modules=["first"]))
    model.first.weight.data.mul_(1000)
    model.add_weighted_adapter(["a"], [2], "twice")
    assert model.first.adapters["twice"].A.shape == (1, 5)


def test_a_module_whose_name_ends_as_another_s() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.first = nn.ModuleDict({"first": nn.Linear(5, 7)}), nn.Linear(7, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.inner["first"](x))

    settings: Any = {"r": 2, "lora_alpha": 5}
    model, _ = adapted(
        LoraConfig(target_modules=["first"], **settings),
        LoraConfig(target_modules=r"first", **settings),
        tiny=lambda: Tiny(Nested(), {"x": torch.ones(1, 5)}),
    )
    model.add_weighted_adapter(["a", "b"], [1, 2], "c")
    a, b, c = (changes(model, name) for name in "abc")
    assert (len(model.first.adapters["c"].A), len(model.inner["first"].adapters["c"].A)) == (4, 2)
    equal(c, {key: a[key] + 2 * b[key] for key in a})


def test_loras_of_several_methods_and_what_is_beside_them() -> None:
    """LoHa, a LoRA with biases, and a union with IA3, at different modules."""
    union = trimtab.UnionConfig(methods=[IA3Config(target_modules=["second"]), lora(1, "head", bias="all")])
    model, _ = adapted(LoHaConfig(r=2, target_modules=["second"]), lora(2, "first", bias="lora_only"), union)
    model.add_weighted_adapter(["a", "b", "c"], [0.5, -1, 2], "sum")
    a, b, c = (changes(model, name) for name in "abc")
    equal(changes(model, "sum"), {key: 0.5 * a[key] - b[key] + 2 * c[key] for key in a})


def test_what_is_trained_whole_is_combined_too() -> None:
    """What modules_to_save names has no base that counts, for it may be new: the mean by weight. Norms have one."""
    settings: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": ["query"]}
    model, _ = adapted(LoraConfig(modules_to_save=["pooler"], **settings), LoraConfig(**settings), tiny=models.bert)
    model.add_weighted_adapter(["a", "b"], [3, -1], "sum")
    a, b, found = weights(model, "a"), weights(model, "b"), weights(model, "sum")
    for end in ("weight", "bias"):
        key = f"classifier.{end}"
        torch.testing.assert_close(found[key], (3 * a[key] - b[key]) / 2)
        torch.testing.assert_close(found[f"bert.pooler.dense.{end}"], a[f"bert.pooler.dense.{end}"])
    with pytest.raises(MergeError, match=r"^classifier is among modules_to_save.* add up to 0"):
        model.add_weighted_adapter(["a", "b"], [1, -1], "zero")
    assert list(model.peft_config) == ["a", "b", "sum"]
    norms, _ = adapted(LNTuningConfig(), LNTuningConfig())
    norms.add_weighted_adapter(["a", "b"], [2, 1], "sum")
    a, b = changes(norms, "a"), changes(norms, "b")
    equal(changes(norms, "sum"), {key: 2 * a[key] + b[key] for key in a})


# ------------------------------------------------------------------------------------------------ pruning and electing


def tensors(n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 6, generator=generator) for _ in range(n)]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_weights_give_hf_peft_s_tensors(kind: str) -> None:
    given, factors = tensors(), torch.full((3,), 0.8)
    theirs = merge_utils.task_arithmetic if kind == "linear" else getattr(merge_utils, kind)
    more = {} if kind == "linear" else {"density": 0.4}
    torch.manual_seed(5)
    expected = theirs([D.clone() for D in given], factors, **more)
    torch.manual_seed(5)
    torch.testing.assert_close(Rule(kind, 0.4)(given, factors.tolist()), expected)


def test_ties_by_hand() -> None:
    """The largest two entries of each; the sign of their sum; the mean of those that have it."""
    a, b = torch.tensor([3.0, -2.0, 0.5, 0.1]), torch.tensor([-1.0, -4.0, 0.2, 3.0])
    assert Rule("ties", 0.5)([a, b], [1, 1]).tolist() == [3.0, -3.0, 0.0, 3.0]
    assert Rule("ties", 0.5)([a, b], [2, -1]).tolist() == [6.0, 0.0, 0.0, -3.0]  # of 2a, -b: 6; -4, 4; none; -3


def test_ties_by_frequency() -> None:
    """Two small ones against a large one; one against one, which is no majority (HF PEFT takes the positive one)."""
    given = [torch.tensor([1.0, 2.0]), torch.tensor([2.0, -3.0]), torch.tensor([-9.0, 0.0])]
    assert Rule("ties", 1.0, "frequency")(given, [1, 1, 1]).tolist() == [1.5, 0.0]
    assert Rule("ties", 1.0, "total")(given, [1, 1, 1]).tolist() == [-9.0, -3.0]


def test_a_weight_of_minus_one_is_the_change_the_other_way_round() -> None:
    a, b, _ = tensors()
    for kind in ("ties", "magnitude_prune"):
        torch.testing.assert_close(Rule(kind, 0.6)([a, b], [1, -1]), Rule(kind, 0.6)([a, -b], [1, 1]))


def test_dare_keeps_the_mean() -> None:
    D = torch.ones(200, 200)
    torch.manual_seed(0)
    found = Rule("dare_linear", 0.25)([D], [1.0])
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(1, abs=0.05)  # its deviation is sqrt(3) / 200 = 0.009


@pytest.mark.parametrize("type_", [type_ for type_ in TYPES if type_ not in ("cat", "linear")])
def test_every_type_by_its_formula(type_: str) -> None:
    """In the weights: pruned and elected as Rule does, cut to the largest singular values."""
    model, _ = adapted(lora(2), lora(3, bias="lora_only"))
    kind = "linear" if type_ == "svd" else type_.removesuffix("_svd")
    density, settings = (0.2, {}) if kind in ("linear", "ties") else (0.5, {"density": 0.5})  # 0.2 is the default
    torch.manual_seed(1)
    kept = model.add_weighted_adapter(["a", "b"], [0.7, 0.6], "c", type_, **settings)
    a, b, c = (changes(model, name) for name in "abc")
    torch.manual_seed(1)
    for path in ("first", "second"):
        own = {name: model.get_submodule(path).adapters[name] for name in "ab"}
        deltas = [(own["a"].B @ own["a"].A * 5 / 2).detach(), (own["b"].B @ own["b"].A * 5 / 3).detach()]
        expected = Rule(kind, density)(deltas, [0.7, 0.6])
        if type_.endswith("svd"):
            U, S, Vh = torch.linalg.svd(expected, full_matrices=False)
            expected = U[:, :3] * S[:3] @ Vh[:3]  # the largest rank of the two
            assert kept[path] == pytest.approx(float(S[:3].square().sum() / S.square().sum()), abs=1e-6)
        torch.testing.assert_close(c[f"{path}.weight"].float(), expected, rtol=1e-5, atol=1e-5)
        shift = Rule(kind, density)([a[f"{path}.bias"].float(), b[f"{path}.bias"].float()], [0.7, 0.6])
        torch.testing.assert_close(c[f"{path}.bias"].float(), shift, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------- beside HF PEFT


@pytest.mark.parametrize("type_", ["svd", "ties_svd", "magnitude_prune_svd"])
def test_hf_peft_s_svd_types_agree(type_: str, tmp_path: Path) -> None:
    """`second` is 6 x 7, of which rank 6 cuts nothing. What DARE draws there depends on how its new adapter began."""
    model, inputs = adapted(lora(2, "second"), lora(3, "second"))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(models.mlp().model, tmp_path / "a", "a")
    theirs.load_adapter(tmp_path / "b", "b")
    settings: dict[str, Any] = {"svd_rank": 6} | ({} if type_ == "svd" else {"density": 0.5})
    for each in (model, theirs):
        torch.manual_seed(2)
        each.add_weighted_adapter(["a", "b"], [0.8, 0.8], "c", type_, **settings)
        each.set_adapter("c")
    close(run(model, inputs), run(theirs, inputs))


def test_svd_clamp_is_hf_peft_s(tmp_path: Path) -> None:
    """Up to the signs of singular vectors, which a symmetric limit does not see."""
    model, _ = adapted(lora(2, "second"), lora(3, "second"))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(models.mlp().model, tmp_path / "a", "a")
    theirs.load_adapter(tmp_path / "b", "b")
    found = []
    for each in (model, theirs):
        each.add_weighted_adapter(["a", "b"], [1.0, 0.5], "c", "svd", svd_rank=3, svd_clamp=0.9)
        own = each.second.adapters["c"] if each is model else each.base_model.model.second
        A, B = (own.A, own.B) if each is model else (own.lora_A["c"].weight, own.lora_B["c"].weight)
        found.append((A.detach().abs(), B.detach().abs()))
        assert float(B.max()) > 0
    for ours, its in zip(*found, strict=True):
        torch.testing.assert_close(ours.sort().values, its.sort().values)


def test_hf_peft_reads_the_result(tmp_path: Path) -> None:
    """With ranks by module, biases and a norm."""
    model, inputs = adapted(
        lora(2, "first", bias="all", modules_to_save=["norm"]), lora(3, use_rslora=True, modules_to_save=["norm"])
    )
    model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "c")
    model.set_adapter("c")
    model.save_pretrained(tmp_path, ["c"])
    theirs = peft.PeftModel.from_pretrained(models.mlp().model, tmp_path / "c")
    close(run(model, inputs), run(theirs.eval(), inputs))


def test_hf_peft_s_own_sums_are_not_sums(tmp_path: Path) -> None:
    """What is said in the docstring of add_weighted_adapter, seen."""
    model, _ = adapted(lora(4, "second", use_rslora=True), lora(4, "second", use_rslora=True))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(models.mlp().model, tmp_path / "a", "a")
    theirs.load_adapter(tmp_path / "b", "b")
    layer = theirs.base_model.model.second
    exact = layer.get_delta_weight("a") + layer.get_delta_weight("b")
    for type_ in ("linear", "cat"):
        theirs.add_weighted_adapter(["a", "b"], [1.0, 1.0], type_, type_)
        assert (layer.get_delta_weight(type_) - exact).norm() > 0.2 * exact.norm()
    assert theirs.add_weighted_adapter(["a"], [5.0], "cat") is None  # a name that exists


# ------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("rank", [2, 0.9, 0.999])
def test_a_conversion_keeps_the_largest_singular_values(rank: float) -> None:
    model, _ = adapted(LoHaConfig(r=2, alpha=3, target_modules=["first", "second"]))
    kept = model.convert_to_lora(rank, "a")
    for path in ("first", "second"):
        whole, found = (changes(model, name)[f"{path}.weight"] for name in ("a", "lora"))
        S = torch.linalg.svdvals(whole)
        shares = S.square().cumsum(0) / S.square().sum()
        r = rank if isinstance(rank, int) else 1 + int((shares < rank).sum())
        assert model.get_submodule(path).adapters["lora"].A.shape[0] == r
        assert kept[path] == pytest.approx(float(shares[r - 1]), abs=1e-5)
        lost = float((whole - found).square().sum() / whole.square().sum())
        assert kept[path] == pytest.approx(1 - lost, abs=1e-5)


def test_an_adapter_that_does_nothing_yet() -> None:
    model, inputs = models.mlp()
    before = run(model, inputs)
    get_peft_model(model, LoHaConfig(r=2, target_modules=["first"]))
    for rank in (2, 0.5):
        assert model.convert_to_lora(rank, lora_name=f"of{int(rank)}") == {"first": 1.0}
        model.set_adapter(f"of{int(rank)}")
        assert same_bits(run(model, inputs), before)


def test_the_result_trains_on() -> None:
    model, inputs = adapted(lora(2), LoHaConfig(r=2, target_modules=["first"]))
    model.convert_to_lora(3, "b", "c")
    model.set_adapter("c")
    first = run(model, inputs)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs).square().sum().backward()
    optimizer.step()
    assert (run(model, inputs) - first).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------- what is refused


def test_a_name_that_exists_is_refused() -> None:
    model, inputs = adapted(lora(), lora())
    before = Snapshot.of(model, inputs)
    for verb in (
        lambda: model.add_weighted_adapter(["a", "b"], [1, 1], "b"),
        lambda: model.convert_to_lora(2, "a", "b"),
    ):
        with pytest.raises(AdapterError, match="There is an adapter 'b' already"):
            verb()
    for verb in (lambda: model.add_weighted_adapter(["a", "bb"], [1, 1], "c"), lambda: model.convert_to_lora(2, "bb")):
        with pytest.raises(AdapterError, match=r"There is no adapter 'bb'\. Did you mean 'b'"):
            verb()
    before.holds(model, inputs)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "c")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"combination_type": "tise"}, "combination_type='tise' is unknown. Did you mean 'ties'"),
        ({"density": 0.5}, "density is of no use to combination_type='linear'"),
        ({"svd_rank": 2}, "svd_rank is of no use to combination_type='linear'"),
        ({"combination_type": "cat", "svd_clamp": 0.5}, "svd_clamp is of no use to combination_type='cat'"),
        ({"combination_type": "ties", "density": 0.5, "svd_driver": "gesvd"}, "svd_driver is of no use"),
        ({"combination_type": "dare_linear", "density": 0.5, "majority_sign_method": "frequency"},
         "majority_sign_method is of no use"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"}, "'most' is unknown"),
        ({"combination_type": "ties", "density": 1.5}, "density=1.5: ties keeps that share"),
        ({"combination_type": "dare_linear_svd", "density": 0.0}, "density=0.0: dare_linear_svd keeps that share"),
        ({"combination_type": "svd", "svd_rank": 0}, "svd_rank=0 is no rank"),
        ({"combination_type": "svd", "svd_clamp": 2.0}, "svd_clamp=2.0 is no quantile"),
        ({"weights": [1.0]}, r"Each adapter needs a finite weight: adapters=\['a', 'b'\], weights=\[1.0\]"),
        ({"weights": [1.0, float("nan")]}, "Each adapter needs a finite weight"),
        ({"weights": [], "adapters": []}, "Each adapter needs a finite weight"),
    ],
)  # fmt: skip
def test_settings_that_are_wrong_or_of_no_use(settings: dict[str, Any], message: str) -> None:
    model, inputs = adapted(lora(), lora())
    before = Snapshot.of(model, inputs)
    with pytest.raises(ConfigError, match=message):
        model.add_weighted_adapter(**{"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "c", **settings})
    before.holds(model, inputs)


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5])
def test_ranks_that_are_none(rank: float) -> None:
    model, _ = adapted(lora())
    with pytest.raises(ConfigError, match=f"rank={rank}: give a rank"):
        model.convert_to_lora(rank, "a")


REFUSED: dict[str, tuple[list[PeftConfig], str, Any]] = {
    "prompts": ([PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")] * 2,
                "^GPT2LMHeadModel: .* changes what goes into a module", models.gpt2),
    "bottleneck": ([trimtab.BottleneckConfig(target_modules=["first"], reduction_factor=2)] * 2,
                   "^first: .*cannot be folded", models.mlp),
    "alora": ([lora(2, "c_attn", alora_invocation_tokens=[5])] * 2, "changes what goes into|aLoRA acts", models.gpt2),
    "groups": ([lora(4, "plane")] * 2, "^plane: A grouped convolution sees its own share",
               lambda: models.convolutions(groups=2)),
    "methods": ([BitFitConfig(target_modules=["norm"]), LNTuningConfig()],
                "not of one method at the same modules: BITFIT, LN_TUNING", models.mlp),
    "other modules": ([IA3Config(target_modules=["first"]), IA3Config(target_modules=["second"])],
                      "not of one method at the same modules: first has one only", models.mlp),
    "other sides": ([IA3Config(target_modules=["first"], feedforward_modules=["first"]),
                     IA3Config(target_modules=["first"])],
                    "^first: the adapters differ in scale: .1, 5., .7, 1.", models.mlp),
    "other tokens": ([TrainableTokensConfig(token_indices=[5, 6]), TrainableTokensConfig(token_indices=[5, 7])],
                     r"the adapters differ in tokens.ids: \[5, 6\], \[5, 7\]", models.llama),
    "other tokens beside": ([lora(2, "q_proj", trainable_token_indices=[5]),
                             lora(2, "q_proj", trainable_token_indices=[7])],
                            r"^model.embed_tokens: the adapters differ in tokens.ids: \[5\], \[7\]", models.llama),
    "whole and adapted": ([lora(2, "first", modules_to_save=["head"]), lora(2, "head")],
                          "^head is trained whole by one", models.mlp),
}  # fmt: skip


@pytest.mark.parametrize(("configs", "message", "tiny"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_sum(configs: list[PeftConfig], message: str, tiny: Any) -> None:
    model, inputs = adapted(*configs, tiny=tiny)
    before = Snapshot.of(model, inputs)
    with pytest.raises(MergeError, match=message):
        model.add_weighted_adapter(["a", "b"], [1, 1], "c")
    before.holds(model, inputs)


def test_svd_without_a_rank_of_which_to_take_the_largest() -> None:
    model, _ = adapted(lora(), IA3Config(target_modules=["first"]))
    with pytest.raises(ConfigError, match=r"svd_rank=None takes the largest rank of the adapters, and 'b' \(IA3\)"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "c", "svd")
    assert model.add_weighted_adapter(["b"], [1], "c", "svd", svd_rank=7)["first"] == pytest.approx(1)
