"""Methods that add a change to a layer's weight, each against its paper's formula, written here a second time."""

import math
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import output
from safetensors.torch import load_file, save_file
from test_formulas import agrees, attached, trained
from torch import nn

from trimtab import (
    CheckpointError,
    ConfigError,
    DeloraConfig,
    FourierFTConfig,
    MissConfig,
    PeftConfig,
    PeftModel,
    RandLoraConfig,
    ShiraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
    get_peft_model,
)
from trimtab.methods.waveft import filters

# ----------------------------------------------------------------------------------------------------------- MiSS


@pytest.mark.parametrize("r", [2, 5])
def test_miss_adds_one_block_to_all_shards(r: int) -> None:
    """5 inputs: the third shard of length 2 is cut off."""
    model, inputs, own = attached(MissConfig(r=r, target_modules=["first"]))
    W = model.first.weight.detach().clone()
    for column in range(5):
        W[:, column] += own["first.D"][column % r]
    agrees(model, inputs["x"], inputs["x"] @ W.T + model.first.bias)
    assert trained(model) == r * 7


def test_mini_miss_repeats_its_block_along_the_outputs() -> None:
    model, _, own = attached(MissConfig(r=2, init_weights="mini", mini_r=3, target_modules=["second"]))
    h = torch.randn(4, 7)
    W = model.second.weight.detach().clone()
    for row in range(6):
        for column in range(7):
            W[row, column] += own["second.D"][column % 2, row % 3]
    torch.testing.assert_close(model.second(h), h @ W.T + model.second.bias)
    assert trained(model) == 2 * 3


def test_bat_multiplies_square_shards_by_a_block_of_their_rows() -> None:
    model, _, own = attached(MissConfig(r=4, init_weights="bat"), models.gpt2())
    site = model.transformer.h[0].attn.c_attn
    W = site.weight.detach().T.clone()  # (48, 16)
    blocks = own["transformer.h.0.attn.c_attn.D"]
    assert blocks.shape == (12, 4, 4)
    for i, D in enumerate(blocks):
        for j in range(4):
            W[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] @= torch.eye(4) + D
            W[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] += D
    x = torch.randn(3, 16)
    torch.testing.assert_close(site(x), x @ W.T + site.bias, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(site.weight.T, W, rtol=1e-5, atol=1e-5)
    assert trained(model) == 2 * 48 * 4


# --------------------------------------------------------------------------------------------------------- DeLoRA


def test_delora_learns_directions_apart_from_their_strength() -> None:
    model, inputs, own = attached(DeloraConfig(r=2, delora_lambda=3, target_modules=["first"]))
    W, l = model.first.weight.detach(), own["first.strength"]  # noqa: E741
    directions = sum(
        torch.outer(b / b.dot(b) ** 0.5, a / a.dot(a) ** 0.5)
        for a, b in zip(own["first.A"], own["first.B"].T, strict=True)
    )
    lengths = torch.stack([column.dot(column) ** 0.5 for column in W.T])
    changed = W + l / 2 * directions * lengths
    agrees(model, inputs["x"], inputs["x"] @ changed.T + model.first.bias)
    assert trained(model) == 2 * (5 + 7) + 1


def test_delora_starts_with_its_strength_and_keeps_the_lengths_in_its_file(tmp_path: Path) -> None:
    """On a base that has changed since, the lengths are still those of the start."""
    model, _, own = attached(DeloraConfig(r=2, delora_lambda=3, init_weights=False, target_modules=["first"]))
    lengths = model.first.weight.detach().norm(dim=0)
    model.save_pretrained(tmp_path)
    other = models.mlp().model
    other.first.weight.data *= 2
    loaded = PeftModel.from_pretrained(other, tmp_path).first.adapters["default"]
    torch.testing.assert_close(loaded.norms, lengths)
    assert torch.equal(loaded.strength, own["first.strength"])
    config = DeloraConfig(r=2, delora_lambda=3, lambda_pattern={"second": 4}, target_modules=["first", "second"])
    fresh = get_peft_model(models.mlp().model, config)
    assert [site.adapters["default"].strength.item() for site in (fresh.first, fresh.second)] == [3, 4]


# ------------------------------------------------------------------------------------------------ FourierFT, WaveFT


def places(out: int, into: int, n: int, seed: int) -> list[tuple[int, int]]:
    """The first n of the entries in a random order, which a file of HF PEFT's does not hold."""
    order = torch.randperm(out * into, generator=torch.Generator().manual_seed(seed)).tolist()
    return [divmod(place, into) for place in order[:n]]


def test_fourierft_adds_waves_at_random_frequencies() -> None:
    """The inverse transform written out: each number is a cosine over rows and columns."""
    config = FourierFTConfig(n_frequency=9, scaling=70, random_loc_seed=5, target_modules=["first"])
    model, inputs, own = attached(config)
    W = model.first.weight.detach().clone()
    rows, columns = torch.arange(7)[:, None], torch.arange(5)
    for value, (u, v) in zip(own["first.spectrum"], places(7, 5, 9, 5), strict=True):
        W += 70 / 35 * value * torch.cos(2 * torch.pi * (u * rows / 7 + v * columns / 5))
    agrees(model, inputs["x"], inputs["x"] @ W.T + model.first.bias)
    assert trained(model) == 9


def test_fourierft_starts_at_random_or_at_zero() -> None:
    def start(init: bool) -> torch.Tensor:
        config = FourierFTConfig(n_frequency=300, init_weights=init, target_modules=["c_attn"])
        return get_peft_model(models.gpt2().model, config).transformer.h[0].attn.c_attn.adapters["default"].spectrum

    assert not start(True).any()
    assert start(False).std().item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("method", [FourierFTConfig, WaveFTConfig], ids=lambda method: method.peft_type)
def test_places_are_held_once_for_each_size_and_not_saved(
    method: type[FourierFTConfig | WaveFTConfig], tmp_path: Path
) -> None:
    """LLaMA's linear layers have 16 x 16, 8 x 16 and 24 x 16 weights, and 16 x 24, which is a size as well."""
    config = method(n_frequency=9, target_modules="all-linear")
    model, inputs, own = attached(config, models.llama())
    assert trained(model) == 2 * 7 * 9 == sum(value.numel() for value in own.values())
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.llama().model, tmp_path)
    torch.testing.assert_close(output(loaded, inputs), expected, rtol=0, atol=0)
    for found in (model, loaded):
        sites = [module for module in found.modules() if "adapters" in module._modules]
        assert len({id(next(iter(site.adapters.values())).places) for site in sites}) == 3


def test_waveft_adds_haar_s_wavelets_at_random_places() -> None:
    """A 2 x 2 block is half the sum of its four bands, with signs. 7 x 5 are made even, 8 x 6, and cut off again."""
    model, inputs, own = attached(WaveFTConfig(n_frequency=20, scaling=3, random_loc_seed=5, target_modules=["first"]))
    C, D = torch.zeros(8, 6), torch.zeros(8, 6)
    for value, place in zip(own["first.spectrum"], places(7, 5, 20, 5), strict=True):
        C[place] = value
    for i in range(4):
        for j in range(3):
            mean, rows, columns, both = C[i, j], C[i, 3 + j], C[4 + i, j], C[4 + i, 3 + j]
            for p, q in ((0, 0), (0, 1), (1, 0), (1, 1)):
                D[2 * i + p, 2 * j + q] = (mean + (-1) ** p * rows + (-1) ** q * columns + (-1) ** (p + q) * both) / 2
    W = model.first.weight.detach() + 3 * D[:7, :5]
    agrees(model, inputs["x"], inputs["x"] @ W.T + model.first.bias)
    assert trained(model) == 20


@pytest.mark.parametrize("moments", range(1, 11))
def test_daubechies_wavelets_are_orthogonal_and_have_their_moments(moments: int) -> None:
    low, high = (torch.tensor(taps, dtype=torch.float64) for taps in filters(moments))
    assert len(low) == len(high) == 2 * moments
    assert low.sum().item() == pytest.approx(2**0.5)
    for step in range(0, 2 * moments, 2):
        rest = len(low) - step
        products = [low[step:] @ low[:rest], high[step:] @ high[:rest], low[step:] @ high[:rest]]
        assert [product.item() for product in products] == pytest.approx(2 * [float(step == 0)] + [0], abs=1e-9)
    places = torch.linspace(-1, 1, 2 * moments, dtype=torch.float64)
    assert all(abs(high @ places**power) < 1e-8 for power in range(moments))  # polynomials leave no trace
    assert low[: moments + 1].norm() > low[moments:].norm()  # of all such filters the one of shortest delay


def test_waveft_without_the_transform_and_with_shares_by_size() -> None:
    """35 and 42 entries, of which 2 * 11 are trained: 10 and 12."""
    config = WaveFTConfig(n_frequency=11, scaling=3, use_idwt=False, proportional_parameters=True,
                          target_modules=["first", "second"])  # fmt: skip
    model, inputs, own = attached(config)
    assert [len(own["first.spectrum"]), len(own["second.spectrum"])] == [10, 12]
    W = model.first.weight.detach().clone()
    for value, place in zip(own["first.spectrum"], places(7, 5, 10, 777), strict=True):
        W[place] += 3 * value
    agrees(model, inputs["x"], inputs["x"] @ W.T + model.first.bias)


def test_waveft_names_the_wavelets_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"wavelet_family='sym4': no such wavelet here. There is: db1, db2, .*db10"):
        WaveFTConfig(wavelet_family="sym4")


# -------------------------------------------------------------------------------------------------------- RandLoRA


@pytest.mark.parametrize(("site", "out", "into"), [("first", 7, 5), ("second", 6, 7)])
def test_randlora_sums_scaled_products_of_random_matrices(site: str, out: int, into: int) -> None:
    """More outputs than inputs, and fewer, where the sum is transposed. 2 products of rank 3."""
    model, _, own = attached(RandLoraConfig(r=3, randlora_alpha=12, target_modules=["first", "second"]))
    layer, short, long = model.get_submodule(site), min(out, into), max(out, into)
    shared, L, G = layer.adapters["default"].shared, own[f"{site}.L"], own[f"{site}.G"]
    rows = torch.stack([L[k, i] * shared.A[k, 0, :short] * G[i] for k in range(3) for i in range(2)])
    columns = torch.stack([shared.B[:long, i, k] for i in range(2) for k in range(3)], 1)
    D = 12 / 3 * columns @ rows
    x = torch.randn(4, into)
    expected = x @ (layer.weight + (D if into < out else D.T)).T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.linalg.matrix_rank(D) == short
    assert trained(model) == (3 * 2 + 2 * 5) + (3 * 2 + 2 * 6)


def test_randlora_s_bases_have_deviation_1_and_the_share_of_zeros_that_was_asked_for() -> None:
    def bases(**settings: bool) -> list[torch.Tensor]:
        layers = nn.Sequential(nn.Linear(100, 225))
        shared = get_peft_model(layers, RandLoraConfig(target_modules=["0"], **settings))[0].adapters["default"].shared
        return [shared.A, shared.B]

    for dense, sparse, very in zip(bases(), bases(sparse=True), bases(very_sparse=True), strict=True):
        assert [found.std().item() for found in (dense, sparse, very)] == pytest.approx([1] * 3, abs=0.01)
        assert [(found != 0).float().mean().item() for found in (dense, sparse, very)] == pytest.approx(
            [1, 1 / 3, 1 / 10], abs=0.02
        )


def test_randlora_reads_the_copies_that_hf_peft_saves_for_every_layer(tmp_path: Path) -> None:
    """If they are copies: another one at some layer is refused, which the one that all share could not be."""
    model, inputs, _ = attached(RandLoraConfig(r=3, target_modules=["first"]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    saved = load_file(path)
    copied = {"base_model.model.first.randlora_A": saved["base_model.randlora_A"].clone()}
    save_file(saved | copied, path)
    loaded = PeftModel.from_pretrained(models.mlp().model, tmp_path)
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), rtol=0, atol=0)
    save_file(saved | {key: value + 1 for key, value in copied.items()}, path)
    with pytest.raises(CheckpointError, match=r"Unexpected: base_model.model.first.randlora_A"):
        PeftModel.from_pretrained(models.mlp().model, tmp_path)


# ----------------------------------------------------------------------------------------------------------- SHiRA


def test_shira_adds_numbers_at_its_places() -> None:
    model, inputs, own = attached(ShiraConfig(r=2, target_modules=["first"]))
    places = model.first.adapters["default"].places.T.tolist()
    assert len({tuple(place) for place in places}) == 2 * (5 + 7)
    W = model.first.weight.detach().clone()
    for value, (row, column) in zip(own["first.values"], places, strict=True):
        W[row, column] += value
    agrees(model, inputs["x"], inputs["x"] @ W.T + model.first.bias)
    assert trained(model) == 2 * (5 + 7)
    assert torch.linalg.matrix_rank(W - models.mlp().model.first.weight) == 5  # though r is 2


def test_shira_s_places_follow_from_the_seed_if_there_is_one() -> None:
    def places(seed: int | None) -> list[torch.Tensor]:
        model = get_peft_model(models.gpt2().model, ShiraConfig(r=2, random_seed=seed))
        return [block.attn.c_attn.adapters["default"].places for block in model.transformer.h]

    (first, second), (again, _), (other, _) = places(3), places(3), places(4)
    assert torch.equal(first, second)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    first, second = places(None)
    assert not torch.equal(first, second)


def test_shira_s_file_holds_any_places(tmp_path: Path) -> None:
    model, inputs, _ = attached(ShiraConfig(r=2, target_modules=["first"]))
    model.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"random"', '"my_custom_mask"'))
    loaded = PeftModel.from_pretrained(models.mlp().model, tmp_path)
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), rtol=0, atol=0)


# -------------------------------------------------------------------------------------------- VB-LoRA, Uni-LoRA


def chosen(logits: torch.Tensor, bank: torch.Tensor, k: int) -> torch.Tensor:
    """The mean of the k vectors of the highest logits (h,), weighted by their exponentials."""
    order = sorted(range(len(bank)), key=lambda place: -logits[place])[:k]
    factors = torch.tensor([math.exp(logits[place]) for place in order])
    return sum(factor * bank[place] for factor, place in zip(factors / factors.sum(), order, strict=True))


def test_vblora_puts_its_matrices_together_from_one_bank() -> None:
    config = VBLoRAConfig(r=3, num_vectors=9, vector_length=4, target_modules=["c_attn", "c_proj"])
    model, _, own = attached(config, models.gpt2())
    name = "transformer.h.0.attn.c_attn"
    site = model.get_submodule(name)
    bank = own[f"{name}.bank.values"]
    W = site.weight.detach().T.clone()  # (48, 16)
    for k in range(3):
        row = torch.cat([chosen(own[f"{name}.logits_A"][k, part], bank, 2) for part in range(4)])
        column = torch.cat([chosen(own[f"{name}.logits_B"][part, k], bank, 2) for part in range(12)])
        W += torch.outer(column, row)
    x = torch.randn(3, 16)
    torch.testing.assert_close(site(x), x @ W.T + site.bias, rtol=1e-5, atol=1e-5)
    sides = 2 * (48 + 16 + 16 + 16 + 24 + 16)  # of c_attn, attention's c_proj and the other c_proj
    assert trained(model) == 9 * 4 + sides // 4 * 3 * 9


def test_vblora_s_bank_is_one_in_memory_and_in_the_file(tmp_path: Path) -> None:
    model, inputs, _ = attached(VBLoRAConfig(r=3, num_vectors=9, vector_length=4), models.gpt2())
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert len(keys) == 1 + 2 * 2
    loaded = PeftModel.from_pretrained(models.gpt2().model, tmp_path, is_trainable=True)
    assert len({id(block.attn.c_attn.adapters["default"].bank.values) for block in loaded.transformer.h}) == 1
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), rtol=0, atol=0)
    output(loaded, inputs).sum().backward()
    assert loaded.transformer.h[1].attn.c_attn.adapters["default"].bank.values.grad.norm() > 0


def test_vblora_starts_within_its_bounds_and_wants_as_many_vectors_as_it_mixes() -> None:
    config = VBLoRAConfig(num_vectors=300, vector_length=16, init_vector_bank_bound=0.5, init_logits_std=3)
    adapter = get_peft_model(models.gpt2().model, config).transformer.h[0].attn.c_attn.adapters["default"]
    assert -0.5 <= adapter.bank.values.min() < -0.49 < 0.49 < adapter.bank.values.max() <= 0.5
    assert adapter.logits_A.std().item() == pytest.approx(3, abs=0.3)
    with pytest.raises(ConfigError, match=r"topk=4 of num_vectors=3 there are not. Closest: 3"):
        VBLoRAConfig(num_vectors=3, topk=4)


def test_unilora_takes_all_matrices_from_one_vector() -> None:
    """13 * 2 + 12 * 2 = 50 entries of 20 numbers: 2 entries each, and a third for half of them."""
    config = UniLoraConfig(r=2, theta_d_length=20, target_modules=["first", "second"])
    model, inputs, own = attached(config)
    projection = model.first.adapters["default"].projection
    assert projection is model.second.adapters["default"].projection
    vector, index = own["first.vector.values"], projection.index.tolist()
    counts = [index.count(number) for number in range(20)]
    assert (len(index), sorted(counts)) == (2 * (5 + 7) + 2 * (7 + 6), 10 * [2] + 10 * [3])
    entries = torch.stack([vector[number] / counts[number] ** 0.5 for number in index])
    A, B, second_A, second_B = entries.split([2 * 5, 7 * 2, 2 * 7, 6 * 2])
    h = torch.randn(3, 7)
    changed = model.second.weight + second_B.view(6, 2) @ second_A.view(2, 7)
    torch.testing.assert_close(model.second(h), h @ changed.T + model.second.bias, rtol=1e-5, atol=1e-6)
    agrees(model, inputs["x"], inputs["x"] @ (model.first.weight + B.view(7, 2) @ A.view(2, 5)).T + model.first.bias)
    assert trained(model) == 20


def test_unilora_keeps_lengths_and_saves_the_vector_alone(tmp_path: Path) -> None:
    model, inputs, own = attached(UniLoraConfig(r=2, theta_d_length=20), models.gpt2())
    pairs = [block.attn.c_attn.adapters["default"].pair() for block in model.transformer.h]
    length = sum(matrix.square().sum() for pair in pairs for matrix in pair)
    vector = next(iter(own.values()))
    torch.testing.assert_close(length.detach(), vector.square().sum())
    model.save_pretrained(tmp_path)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["base_model.unilora_theta_d"]
    loaded = PeftModel.from_pretrained(models.gpt2().model, tmp_path)
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("init", [True, False])
def test_unilora_starts_within_its_bound_or_normally(init: bool) -> None:
    config = UniLoraConfig(theta_d_length=500, init_theta_d_bound=0.5, init_weights=init)
    values = get_peft_model(models.gpt2().model, config).transformer.h[0].attn.c_attn.adapters["default"].vector.values
    assert (values.abs().max() <= 0.5) == init
    assert values.std().item() == pytest.approx(0.5 / 3**0.5 if init else 1, abs=0.1)


# -------------------------------------------------------------------------------------------------------- TinyLoRA


def between(W: torch.Tensor, v: torch.Tensor, r: int, seed: int) -> torch.Tensor:
    """The change of a weight: U sqrt(S) (sum of v_i P_i) sqrt(S) V^T of its first r singular vectors."""
    P = torch.normal(0.0, r**-0.5, (len(v), r, r), generator=torch.Generator().manual_seed(seed))
    U, S, V = torch.linalg.svd(W)
    half = torch.diag(S[:r].sqrt())
    return U[:, :r] @ half @ sum(number * P[i] for i, number in enumerate(v)) @ half @ V[:r]


def test_tinylora_mixes_random_matrices_between_singular_vectors() -> None:
    """The second site's seed is one higher."""
    model, inputs, own = attached(TinyLoraConfig(r=3, u=4, projection_seed=8, target_modules=["first", "second"]))
    h = torch.randn(3, 7)
    W = model.second.weight + between(model.second.weight, own["second.shared.values"], 3, 9)
    torch.testing.assert_close(model.second(h), h @ W.T + model.second.bias, rtol=1e-4, atol=1e-5)
    W = model.first.weight + between(model.first.weight, own["first.shared.values"], 3, 8)
    agrees(model, inputs["x"], inputs["x"] @ W.detach().T + model.first.bias)
    assert trained(model) == 2 * 4


def test_tinylora_changes_the_table_of_an_embedding() -> None:
    model, inputs, own = attached(TinyLoraConfig(r=2, u=4, target_modules=["token"]), models.embeddings())
    table = (model.token.weight + between(model.token.weight, own["token.shared.values"], 2, 42)).detach()
    torch.testing.assert_close(model.token(inputs["input_ids"]), table[inputs["input_ids"]], rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model.token.weight.detach(), table, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tying", "groups"), [(0, [0, 1, 2, 3, 4, 5]), (0.5, [0, 0, 1, 1, 2, 2]), (0.3, [0, 1, 2, 3, 3, 3]), (1, 6 * [0])]
)
def test_tinylora_s_sites_share_by_groups(tying: float, groups: list[int], tmp_path: Path) -> None:
    """Six sites, of which 6 (1 - tying), rounded, have vectors of their own; the last one is for all that are left."""
    config = TinyLoraConfig(u=4, weight_tying=tying, target_modules=["c_attn", "c_proj"])
    model, inputs, _ = attached(config, models.gpt2())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.gpt2().model, tmp_path)
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), rtol=0, atol=0)
    assert trained(model) == 4 * len(set(groups))
    for found in (model, loaded):
        adapters = [module.adapters["default"] for module in found.modules() if "adapters" in module._modules]
        assert [adapter.group for adapter in adapters] == groups
        vectors = [id(adapter.shared.values) for adapter in adapters]
        assert [vectors.index(vector) for vector in vectors] == [groups.index(group) for group in groups]


@pytest.mark.parametrize("saved", [True, False])
def test_tinylora_s_file_holds_the_singular_vectors_and_may_hold_the_projections(saved: bool, tmp_path: Path) -> None:
    model, inputs, _ = attached(TinyLoraConfig(u=4, save_projection=saved, target_modules=["first"]))
    model.save_pretrained(tmp_path)
    ends = sorted(key.rpartition("tinylora_")[2] for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert ends == ["A", "B", *["P"] * saved, "v.0"]
    loaded = PeftModel.from_pretrained(models.mlp().model, tmp_path)
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), rtol=0, atol=0)


@pytest.mark.parametrize(("init", "bound"), [(True, 0.0), ("uniform", 0.3), (False, 10.0)])
def test_tinylora_s_starts(init: bool | str, bound: float) -> None:
    config = TinyLoraConfig(u=900, init_weights=init, init_v_bound=0.3, target_modules=["first"])
    v = get_peft_model(models.mlp().model, config).first.adapters["default"].shared.values
    assert v.abs().max() <= bound
    assert v.std().item() == pytest.approx({True: 0, "uniform": 0.3 / 3**0.5, False: 1}[init], abs=0.1)


# ------------------------------------------------------------------------------------------ what follows from a seed


@pytest.mark.parametrize(
    ("first", "other", "saved"),
    [
        (FourierFTConfig(n_frequency=9), {"random_loc_seed": 5}, False),
        (WaveFTConfig(n_frequency=9), {"random_loc_seed": 5}, False),
        (WaveFTConfig(n_frequency=9), {"wavelet_family": "db2"}, False),
        (VeraConfig(r=4, save_projection=False), {"projection_prng_key": 5}, False),
        (VeraConfig(r=4), {"projection_prng_key": 5}, True),
        (RandLoraConfig(r=4, save_projection=False), {"projection_prng_key": 5}, False),
        (RandLoraConfig(r=4, save_projection=False), {"sparse": True}, False),
        (RandLoraConfig(r=4), {"projection_prng_key": 5}, True),
        (UniLoraConfig(theta_d_length=20), {"proj_seed": 5}, False),
        (TinyLoraConfig(u=4, save_projection=False), {"projection_seed": 5}, False),
        (TinyLoraConfig(u=4), {"projection_seed": 5}, True),
        (ShiraConfig(r=2, random_seed=3), {"random_seed": 5}, True),
    ],
    ids=lambda value: getattr(value, "peft_type", str(value)),
)
def test_adapters_of_two_seeds_change_places_only_if_files_hold_what_was_drawn(
    first: PeftConfig, other: dict[str, Any], saved: bool, tmp_path: Path
) -> None:
    model, inputs, _ = attached(first.model_copy(update=other), models.gpt2())
    model.save_pretrained(tmp_path)
    expected = output(model, inputs)
    swapped, _, _ = attached(first, models.gpt2())
    if saved:
        swapped.hotswap_adapter(tmp_path, "default")
        torch.testing.assert_close(output(swapped, inputs), expected, rtol=0, atol=0)
    else:
        with pytest.raises(CheckpointError, match="it differs in"):
            swapped.hotswap_adapter(tmp_path, "default")
