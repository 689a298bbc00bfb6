"""Each method against its paper's formula, written here a second time: outputs, merged weights, parameter counts."""

from typing import Any

import models
import pytest
import torch
from models import output, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab
from trimtab import (
    BitFitConfig,
    BOFTConfig,
    ConfigError,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    TargetError,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    weights,
)


def attached(config: PeftConfig, tiny: models.Tiny | None = None) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """A model with a randomised adapter, its inputs, and the adapters' weights by site and name."""
    model, inputs = tiny or models.mlp()
    get_peft_model(model, config)
    randomise(model)
    own = {name.replace(".adapters.default", ""): p for name, p in model.named_parameters() if ".adapters." in name}
    return model, inputs, {name: p.detach() for name, p in own.items()}


def agrees(model: nn.Module, x: Tensor, expected: Tensor) -> None:
    """The site `first` of the MLP gives what the formula says, as an adapter and merged."""
    torch.testing.assert_close(model.first(x), expected, rtol=1e-5, atol=1e-6)
    model.merge_adapter()
    torch.testing.assert_close(F.linear(x, model.first.weight, model.first.bias), expected, rtol=1e-5, atol=1e-6)


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------------------ IA3


def test_ia3_scales_what_leaves_a_layer() -> None:
    model, inputs, own = attached(IA3Config(target_modules=["first"]))
    W, b = model.first.weight, model.first.bias
    l = own["first.scale"].flatten()  # noqa: E741
    agrees(model, inputs["x"], l * (inputs["x"] @ W.T + b))
    assert trained(model) == 7


def test_ia3_scales_what_enters_a_feedforward_layer() -> None:
    model, inputs, own = attached(IA3Config(target_modules=["first"], feedforward_modules=["first"]))
    W, b = model.first.weight, model.first.bias
    l = own["first.scale"].flatten()  # noqa: E741
    agrees(model, inputs["x"], (l * inputs["x"]) @ W.T + b)
    assert trained(model) == 5


def test_ia3_takes_the_papers_parts_by_itself() -> None:
    model, _, own = attached(IA3Config(), models.t5())
    layers, kv, ff = 2, 2 * 6, 24
    assert trained(model) == layers * (2 * kv + ff) + layers * (4 * kv + ff)  # the decoder attends twice
    assert model.peft_config["default"].feedforward_modules == ["wo"]
    assert own["encoder.block.0.layer.1.DenseReluDense.wo.scale"].shape == (1, 24)


def test_ia3_refuses_a_feedforward_module_that_is_no_target() -> None:
    with pytest.raises(ConfigError, match=r"'second' matches no target.*There is: first"):
        get_peft_model(models.mlp().model, IA3Config(target_modules=["first"], feedforward_modules=["second"]))
    with pytest.raises(TargetError, match="cannot be scaled"):
        get_peft_model(models.embeddings().model, IA3Config(target_modules=["token"], feedforward_modules=["token"]))


# ---------------------------------------------------------------------------------------------------------- norms


def test_layer_norm_tuning_trains_the_norms_own_values() -> None:
    model, _, own = attached(LNTuningConfig())
    x = torch.randn(3, 6)
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = normal * own["norm.replacement.weight"] + own["norm.replacement.bias"]
    torch.testing.assert_close(model.norm(x), expected, rtol=1e-5, atol=1e-6)
    assert trained(model) == 2 * 6


def test_layer_norm_tuning_finds_every_norm_whatever_its_class() -> None:
    model = get_peft_model(models.llama().model, LNTuningConfig())
    assert trained(model) == (2 * 2 + 1) * 16
    assert model.peft_config["default"].target_modules == ["input_layernorm", "norm", "post_attention_layernorm"]


@pytest.mark.parametrize("trains", [False, True])
def test_norms_that_pytorch_reads_without_calling_are_adapted_too(trains: bool) -> None:
    """nn.TransformerEncoderLayer's fast path, taken without gradients, hands the norms' weights to one kernel."""
    model, inputs, own = attached(LNTuningConfig(), models.encoder())
    plain, _ = models.encoder()
    for name, value in own.items():
        plain.get_parameter(name.replace(".replacement", "")).data.copy_(value)
    with torch.set_grad_enabled(trains):
        torch.testing.assert_close(output(model, inputs), output(plain, inputs), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- BitFit


def test_bitfit_trains_all_biases_and_nothing_else() -> None:
    model, inputs, own = attached(BitFitConfig())
    b = own["first.bias.value"]
    agrees(model, inputs["x"], inputs["x"] @ model.first.weight.T + b)
    assert trained(model) == 7 + 6 + 6 + 3  # first, second, norm, head


def test_bitfit_in_attention_only() -> None:
    model = get_peft_model(models.bert().model, BitFitConfig(target_modules="attention"))
    assert trained(model) == 2 * (3 * 16 + 16 + 16)  # query, key, value, output, its norm
    with pytest.raises(TargetError, match="none in attention"):
        get_peft_model(models.mlp().model, BitFitConfig(target_modules="attention"))


def test_bitfit_on_a_model_without_biases_is_refused() -> None:
    with pytest.raises(TargetError, match="biases, of which T5ForConditionalGeneration has none"):
        trimtab.get_peft_model(models.t5().model, BitFitConfig())


# ----------------------------------------------------------------------------------------------------------- DoRA


def dora_weight(W: Tensor, own: dict[str, Tensor], scale: float) -> Tensor:
    """m (W + s B A) / ||W + s B A||, row by row."""
    V = W + scale * (own["first.B"].flatten(1) @ own["first.A"].flatten(1)).view_as(W)
    lengths = V.flatten(1).norm(dim=1)
    m = own["first.magnitude.value"].flatten()
    return V * (m / lengths).view(-1, *[1] * (W.dim() - 1))


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 7}, {"lora_alpha": 7, "use_rslora": True}], ids=str)
def test_dora_learns_lengths_beside_directions(settings: dict[str, Any]) -> None:
    """On a layer with a bias and with alpha other than r."""
    model, inputs, own = attached(LoraConfig(r=2, use_dora=True, target_modules=["first"], **settings))
    scale = settings.get("lora_alpha", 8) / (2**0.5 if settings.get("use_rslora") else 2)
    agrees(model, inputs["x"], inputs["x"] @ dora_weight(model.first.weight, own, scale).T + model.first.bias)
    assert trained(model) == 2 * (5 + 7) + 7


def test_dora_starts_at_the_weights_own_lengths() -> None:
    tiny = models.mlp()
    lengths = tiny.model.first.weight.detach().norm(dim=1)
    model = get_peft_model(tiny.model, LoraConfig(use_dora=True, r=2, target_modules=["first"]))
    torch.testing.assert_close(model.first.adapters["default"].magnitude.value.detach(), lengths)


@pytest.mark.parametrize("build", models.QUANTIZED.values(), ids=models.QUANTIZED)
def test_dora_on_a_quantized_layer_measures_the_dequantized_weight(build: Any) -> None:
    pytest.importorskip("bitsandbytes")
    tiny = build()
    before = output(*tiny)  # the first call moves the scales of 8-bit layers
    model = get_peft_model(tiny.model, LoraConfig(r=2, lora_alpha=5, use_dora=True, target_modules=["first"]))
    torch.testing.assert_close(output(*tiny), before, rtol=1e-4, atol=1e-4)
    randomise(model)
    own = {name.replace(".adapters.default", ""): p.detach() for name, p in model.named_parameters()}
    W = weights.read(model.first)
    x = tiny.inputs["x"]
    with torch.no_grad():
        base = super(type(model.first), model.first).forward(x)
        # 8-bit layers round their input as well, so what they add to x W is taken as it is.
        exact = x @ W.T + model.first.bias
        expected = x @ dora_weight(W, own, 2.5).T + model.first.bias
        got = model.first(x) - expected
    assert got.abs().max() <= 3 * (base - exact).abs().max() + 1e-4


def test_dora_dropout_acts_on_the_low_rank_part_only() -> None:
    """With everything dropped what is left is the rescaled base: g W x + b."""
    model, inputs, own = attached(LoraConfig(r=2, use_dora=True, lora_dropout=0.999999, target_modules=["first"]))
    V = model.first.weight + 4 * own["first.B"] @ own["first.A"]
    g = own["first.magnitude.value"] / V.norm(dim=1)
    got = model.train().first(inputs["x"])
    torch.testing.assert_close(got, g * (inputs["x"] @ model.first.weight.T) + model.first.bias, rtol=1e-5, atol=1e-6)


def test_dora_takes_the_norm_as_a_constant_in_the_gradient() -> None:
    model, inputs, own = attached(LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=["first"]))
    A, B, m = (own[f"first.{name}"].clone().requires_grad_() for name in ("A", "B", "magnitude.value"))
    V = model.first.weight + B @ A
    (inputs["x"] @ ((m / V.detach().norm(dim=1))[:, None] * V).T).square().sum().backward()
    (model.first(inputs["x"]) - model.first.bias).square().sum().backward()
    adapter = model.first.adapters["default"]
    for got, expected in ((adapter.A, A), (adapter.B, B), (adapter.magnitude.value, m)):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_dora_on_a_grouped_convolution_is_refused() -> None:
    with pytest.raises(ConfigError, match="plane has 2 groups"):
        get_peft_model(models.convolutions(groups=2).model, LoraConfig(r=2, use_dora=True, target_modules=["plane"]))


# ----------------------------------------------------------------------------------------------------------- VeRA


def test_vera_trains_two_vectors_between_frozen_projections() -> None:
    model, inputs, own = attached(VeraConfig(r=6, target_modules=["first", "second"]))
    shared = model.first.adapters["default"].shared
    assert shared.A.shape == (6, 7)  # the widest input, second's
    assert shared.B.shape == (7, 6)  # the widest output, first's
    A, B = shared.A[:, :5], shared.B[:7]
    delta = torch.diag(own["first.lambda_b"]) @ B @ torch.diag(own["first.lambda_d"]) @ A
    agrees(model, inputs["x"], inputs["x"] @ (model.first.weight + delta).T + model.first.bias)
    assert trained(model) == (7 + 6) + (6 + 6)


def test_vera_on_bert_base_trains_18624_numbers() -> None:
    """Of query and value in 12 layers, 768 + 8 each: the count in the paper's terms, L * (out + r)."""
    with torch.device("meta"):
        from transformers import BertConfig, BertModel

        model = get_peft_model(BertModel(BertConfig()), VeraConfig(r=8))
    assert trained(model) == 24 * (768 + 8) == 18_624


def test_vera_saves_its_projections_once_or_not_at_all(tmp_path: Any) -> None:
    from safetensors.torch import load_file

    for saved in (True, False):
        model, inputs, _ = attached(VeraConfig(r=5, save_projection=saved), models.llama())
        expected = output(model, inputs)
        model.save_pretrained(tmp_path / str(saved))
        keys = load_file(tmp_path / str(saved) / "adapter_model.safetensors")
        assert ["base_model.vera_A" in keys, "base_model.vera_B" in keys] == [saved, saved]
        assert len(keys) == 4 * 2 + 2 * saved
        torch.manual_seed(99)  # not the seed it was made with
        loaded = trimtab.PeftModel.from_pretrained(models.llama().model, tmp_path / str(saved))
        torch.testing.assert_close(output(loaded, inputs), expected, rtol=0, atol=0)
        shared = {
            id(site.adapters["default"].shared) for _, site in loaded.named_modules() if "adapters" in site._modules
        }
        assert len(shared) == 1


def test_vera_s_seed_decides_its_projections() -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(torch.seed() % 1000)
        model = get_peft_model(models.mlp().model, VeraConfig(r=4, projection_prng_key=seed, target_modules=["first"]))
        return model.first.adapters["default"].shared.A

    assert torch.equal(drawn(0), drawn(0))  # 0 is a seed, too
    assert not torch.equal(drawn(0), drawn(1))


# ----------------------------------------------------------------------------------------------------- LoHa, LoKr


def test_loha_multiplies_two_low_rank_matrices_elementwise() -> None:
    model, inputs, own = attached(LoHaConfig(r=2, alpha=3, target_modules=["first"]))
    first, second = own["first.A1"] @ own["first.B1"], own["first.A2"] @ own["first.B2"]
    assert torch.linalg.matrix_rank(first * second) == 4  # r^2
    W = model.first.weight + 3 / 2 * first * second
    agrees(model, inputs["x"], inputs["x"] @ W.T + model.first.bias)
    assert trained(model) == 2 * 2 * (5 + 7)


def test_loha_refuses_a_rank_above_the_matrix() -> None:
    with pytest.raises(ConfigError, match=r"first has a rank of 5 at most: 6 is too much. Closest: 5"):
        get_peft_model(models.mlp().model, LoHaConfig(r=6, target_modules=["first"]))


def test_lokr_is_a_kronecker_product() -> None:
    """12 = 3 * 4 outputs, 8 = 2 * 4 inputs."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12))
    W, b = base[0].weight.detach().clone(), base[0].bias.detach().clone()
    model, _, own = attached(LoKrConfig(r=1, alpha=5, target_modules=["0"]), models.Tiny(base, {}))
    C1, C2 = own["0.C1"], own["0.A2"] @ own["0.B2"]
    assert (C1.shape, C2.shape) == ((3, 2), (4, 4))
    blocks = torch.cat([torch.cat([C1[i, j] * C2 for j in range(2)], 1) for i in range(3)], 0)
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), x @ (W + 5 * blocks).T + b, rtol=1e-5, atol=1e-5)
    assert trained(model) == 6 + 4 + 4


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [(12, -1, (3, 4)), (16, -1, (4, 4)), (7, -1, (1, 7)), (128, 4, (4, 32)), (18, 5, (3, 6)), (12, 6, (6, 2))],
)
def test_lokr_splits_sizes_as_square_as_it_may(size: int, factor: int, expected: tuple[int, int]) -> None:
    from trimtab.methods.lokr import two_factors

    assert two_factors(size, factor) == expected


def test_lokr_refuses_the_factor_0() -> None:
    with pytest.raises(ConfigError, match="no size has the divisor 0"):
        LoKrConfig(decompose_factor=0)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_dropped_rows_and_modules(config: type[LoHaConfig | LoKrConfig]) -> None:
    model, inputs, _ = attached(config(r=2, module_dropout=0.999999, target_modules=["first"]))
    base = inputs["x"] @ model.first.weight.T + model.first.bias
    torch.testing.assert_close(model.train().first(inputs["x"]), base)
    assert (model.eval().first(inputs["x"]) - base).abs().max() > 1e-2
    model, inputs, _ = attached(config(r=2, rank_dropout=0.5, target_modules=["first"]))
    change = model.train().first(inputs["x"]) - base
    dropped = (change == 0).all(0)
    assert 0 < dropped.sum() < 7  # whole outputs, some of them


# ------------------------------------------------------------------------------------------------- OFT, BOFT, HRA


def skew(upper: Tensor, b: int) -> Tensor:
    """The matrix with these numbers above its diagonal, row by row, and minus them below."""
    Q, numbers = torch.zeros(b, b), iter(upper.tolist())
    for i in range(b):
        for j in range(i + 1, b):
            Q[i, j] = next(numbers)
            Q[j, i] = -Q[i, j]
    return Q


def rotating(config: PeftConfig) -> tuple[Any, Tensor, Tensor, dict[str, Tensor]]:
    """A layer of 8 inputs and 3 outputs with a randomised adapter; its weight and bias as they were."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 3))
    model, _, own = attached(config, models.Tiny(base, {}))
    return model, base[0].weight.detach(), base[0].bias.detach(), own


def test_oft_turns_inputs_by_cayley_blocks() -> None:
    model, W, b, own = rotating(OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["0"]))
    eye = torch.eye(4)
    blocks = [(eye - Q) @ torch.linalg.inv(eye + Q) for Q in (skew(row, 4) for row in own["0.upper"])]
    R = torch.block_diag(*blocks)
    torch.testing.assert_close(R @ R.T, torch.eye(8), rtol=1e-5, atol=1e-5)
    x = torch.randn(5, 8)
    torch.testing.assert_close(model(x), x @ R @ W.T + b, rtol=1e-5, atol=1e-5)
    assert trained(model) == 2 * 4 * 3 // 2


@pytest.mark.parametrize(
    ("terms", "powers"), [(1, []), (2, [2]), (3, [2, 2, 1]), (5, [2, 2, 2, 1]), (6, [2, 2, 2, 2, 1])]
)
def test_oft_s_series(terms: int, powers: list[int]) -> None:
    """I + 2 Q + 2 Q^2 + ..., the last term once, of blocks that share their numbers."""
    config = OFTConfig(oft_block_size=4, block_share=True, num_cayley_neumann_terms=terms, target_modules=["0"])
    model, W, b, own = rotating(config)
    Q = skew(own["0.upper"][0], 4)
    R = torch.eye(4) + sum(factor * torch.linalg.matrix_power(Q, k) for k, factor in enumerate(powers, 1))
    x = torch.randn(5, 8)
    torch.testing.assert_close(model(x), x @ torch.block_diag(R, R) @ W.T + b, rtol=1e-5, atol=1e-5)
    assert trained(model) == 4 * 3 // 2


def test_constrained_oft_bounds_the_turning_and_passes_the_gradient_on() -> None:
    config = OFTConfig(oft_block_size=4, coft=True, eps=0.1, use_cayley_neumann=False, target_modules=["0"])
    model, W, b, own = rotating(config)
    limit = 0.1 / 2**0.5
    short = [Q * min(1.0, limit / Q.norm().item()) for Q in (skew(row, 4) for row in own["0.upper"])]
    R = torch.block_diag(*((torch.eye(4) - Q) @ torch.linalg.inv(torch.eye(4) + Q) for Q in short))
    x = torch.randn(5, 8)
    torch.testing.assert_close(model(x), x @ R @ W.T + b, rtol=1e-5, atol=1e-5)
    model(x).square().sum().backward()
    assert model[0].adapters["default"].upper.grad.norm() > 0


def test_oft_refuses_a_block_size_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"0 turns 8 features: oft_block_size=3 does not divide them. Closest: 2"):
        rotating(OFTConfig(oft_block_size=3, target_modules=["0"]))
    with pytest.raises(ConfigError, match="give one of the two, and 0 for the other"):
        OFTConfig(r=4)


def test_boft_multiplies_permuted_block_diagonal_factors() -> None:
    """Blocks (2, 2) of 8 features, 3 factors: inputs 1, 2 and 4 apart are mixed."""
    config = BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, target_modules=["0"])
    model, W, b, own = rotating(config)
    M = torch.eye(8)
    for factor, step in ((2, 4), (1, 2), (0, 1)):
        mixed = torch.zeros(8, 8)
        pairs = [(i, i + step) for i in range(8) if i // step % 2 == 0]
        for block, (i, j) in zip(own["0.blocks"][factor], pairs, strict=True):
            Q = (block - block.T) / 2
            R = (torch.eye(2) - Q) @ torch.linalg.inv(torch.eye(2) + Q)
            mixed[i, i], mixed[i, j], mixed[j, i], mixed[j, j] = R[0, 0], R[0, 1], R[1, 0], R[1, 1]
        M = M @ mixed
    x = torch.randn(5, 8)
    expected = own["0.scale"].flatten() * (x @ M @ W.T) + b
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert trained(model) == 3 * 4 * 4 + 3


def test_boft_refuses_more_factors_than_its_blocks_allow() -> None:
    with pytest.raises(ConfigError, match=r"0 has 4 blocks of 2: boft_n_butterfly_factor=4 .*\. Closest: 3"):
        rotating(BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=4, target_modules=["0"]))
    with pytest.raises(ConfigError, match="Closest: 4"):
        rotating(BOFTConfig(boft_block_size=5, target_modules=["0"]))


def test_hra_reflects_one_vector_after_the_other() -> None:
    model, W, b, own = rotating(HRAConfig(r=4, target_modules=["0"]))
    H = torch.eye(8)
    for u in own["0.u"].T:
        H = H @ (torch.eye(8) - 2 * torch.outer(u, u) / u.dot(u))
    x = torch.randn(5, 8)
    torch.testing.assert_close(model(x), x @ (W @ H).T + b, rtol=1e-5, atol=1e-5)
    assert trained(model) == 8 * 4


def test_hra_with_orthogonal_vectors() -> None:
    model, W, b, own = rotating(HRAConfig(r=3, apply_GS=True, target_modules=["0"]))
    basis: list[Tensor] = []
    for u in own["0.u"].T:  # Gram-Schmidt
        u = u - sum((u.dot(e) * e for e in basis), torch.zeros(8))
        basis.append(u / u.norm())
    U = torch.stack(basis, 1)
    x = torch.randn(5, 8)
    torch.testing.assert_close(model(x), x @ (W @ (torch.eye(8) - 2 * U @ U.T)).T + b, rtol=1e-5, atol=1e-5)


def test_hra_starts_with_pairs_of_reflections() -> None:
    with pytest.raises(ConfigError, match=r"r must be even, not 3. Closest: 2"):
        rotating(HRAConfig(r=3, target_modules=["0"]))
    with pytest.raises(ConfigError, match=r"0 has a rank of 8 at most: 10 is too much. Closest: 8"):
        rotating(HRAConfig(r=10, target_modules=["0"]))


# ----------------------------------------------------------------------------------------------- trainable tokens


def test_trainable_tokens_replace_rows_of_the_table() -> None:
    model, _, own = attached(TrainableTokensConfig(token_indices=[9, 5, 60], target_modules=["token"]),
                                  models.embeddings())  # fmt: skip
    table = model.token.weight.detach().clone()
    for row, token in enumerate([9, 5, 60]):
        table[token] = own["token.tokens.value"][row]
    ids = torch.tensor([[5, 9, 0, 63], [60, 60, 5, 6]])
    torch.testing.assert_close(model.token(ids), table[ids], rtol=1e-5, atol=1e-6)
    model.merge_adapter()
    torch.testing.assert_close(model.token.weight, table, rtol=1e-5, atol=1e-6)
    assert trained(model) == 3 * 6


def test_trainable_tokens_on_a_linear_layer_keep_its_bias() -> None:
    model, _, own = attached(TrainableTokensConfig(token_indices=[2, 0], target_modules=["head"]))
    W = torch.stack([own["head.tokens.value"][1], model.head.weight[1], own["head.tokens.value"][0]])
    x = torch.randn(4, 6)
    torch.testing.assert_close(model.head(x), x @ W.T + model.head.bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [TrainableTokensConfig(token_indices=[9, 5]), LoraConfig(r=2, trainable_token_indices=[9, 5])],
    ids=["alone", "with LoRA"],
)
def test_tied_tables_share_the_trained_rows(config: PeftConfig, tmp_path: Any) -> None:
    model, inputs, own = attached(config, models.llama(tie_word_embeddings=True))
    table = model.model.embed_tokens.weight.detach().clone()
    table[9], table[5] = own["model.embed_tokens.tokens.value"]
    h = torch.randn(2, 16)
    torch.testing.assert_close(model.lm_head(h), h @ table.T, rtol=1e-5, atol=1e-5)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = trimtab.PeftModel.from_pretrained(models.llama(tie_word_embeddings=True).model, tmp_path)
    torch.testing.assert_close(output(loaded, inputs), expected, rtol=0, atol=0)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight  # still tied
    torch.testing.assert_close(merged.lm_head.weight, table, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output(merged, inputs), expected, rtol=1e-4, atol=1e-5)


def test_trainable_tokens_refuse_what_the_table_does_not_hold() -> None:
    with pytest.raises(ConfigError, match=r"has 64 tokens: 64 is none of them. Closest: 63"):
        get_peft_model(models.llama().model, TrainableTokensConfig(token_indices=[3, 64]))
    with pytest.raises(ConfigError, match="token 3 is listed twice"):
        get_peft_model(models.llama().model, TrainableTokensConfig(token_indices=[3, 5, 3]))
    with pytest.raises(ConfigError, match="no token is chosen"):
        TrainableTokensConfig()
    with pytest.raises(TargetError, match="does not tell which embedding"):
        get_peft_model(models.embeddings().model, TrainableTokensConfig(token_indices=[3]))
    with pytest.raises(TargetError, match=r"lm_head is adapted or saved whole, and holds tokens"):
        get_peft_model(models.llama(tie_word_embeddings=True).model,
                       LoraConfig(target_modules=["lm_head"], trainable_token_indices=[3]))  # fmt: skip
    with pytest.raises(TargetError, match=r"lm_head is tied to the table .*leave it out"):
        get_peft_model(models.llama(tie_word_embeddings=True).model,
                       TrainableTokensConfig(token_indices=[3], modules_to_save=["lm_head"]))  # fmt: skip


# --------------------------------------------------------------------------------------------------- LoRA's starts


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_16", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_lora_starts_at_parts_of_the_weight(kind: str, dora: bool) -> None:
    """A and B are the paper's, nothing changes at first, and training goes on from W - s B0 A0."""
    tiny = models.mlp()
    W, b = tiny.model.first.weight.detach(), tiny.model.first.bias.detach()
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    W.copy_(U @ torch.tensor([4.0, 3.0, 0.3, 0.2, 0.1]).diag() @ Vh)  # with a gap that a randomised SVD finds
    W = W.clone()
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=kind, use_dora=dora, target_modules=["first"])
    model = get_peft_model(tiny.model, config)
    adapter, x = model.first.adapters["default"], tiny.inputs["x"]
    A0, B0 = adapter.A.detach().clone(), adapter.B.detach().clone()
    if kind == "olora":
        expected = torch.linalg.qr(W)[0][:, :2] @ torch.linalg.qr(W)[1][:2]
    else:
        expected = U[:, :2] @ torch.tensor([4.0, 3.0]).diag() @ Vh[:2] / 3
        torch.testing.assert_close(A0 @ A0.T, torch.tensor([4.0, 3.0]).diag() / 3, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(B0 @ A0, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.first(x), F.linear(x, W, b)) or dora
    torch.testing.assert_close(model.first(x), F.linear(x, W, b), rtol=1e-5, atol=1e-5)
    randomise(model)
    V = W - 3 * B0 @ A0 + 3 * adapter.B.detach() @ adapter.A.detach()
    if dora:
        V = V * (adapter.magnitude.value.detach() / V.norm(dim=1))[:, None]
    agrees(model, x, F.linear(x, V, b))
    model.unload()
    assert torch.equal(tiny.model.first.weight, W)  # the base never changes


def test_the_orthogonal_start_changes_nothing() -> None:
    tiny = models.mlp()
    before = output(*tiny)
    model = get_peft_model(
        tiny.model, LoraConfig(r=4, init_lora_weights="orthogonal", target_modules=["first", "second"])
    )
    adapter = model.first.adapters["default"]
    assert adapter.A.norm() > 0.1
    assert adapter.B.norm() > 0.1
    torch.testing.assert_close(adapter.B @ adapter.A, torch.zeros(7, 5), rtol=0, atol=1e-6)
    torch.testing.assert_close(output(*tiny), before, rtol=1e-5, atol=1e-5)


def test_starts_that_make_no_sense_are_refused() -> None:
    for settings, message in (
        ({"init_lora_weights": "pisa"}, "Did you mean 'pissa'"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "r must be even, not 3. Closest: 2"),
        ({"init_lora_weights": "pissa", "r": 6}, "first is a matrix of rank 5 at most: .*Closest: 5"),
    ):
        with pytest.raises(ConfigError, match=message):
            get_peft_model(models.mlp().model, LoraConfig(target_modules=["first"], **settings))
    with pytest.raises(ConfigError, match="token is a Embedding, not a linear layer"):
        get_peft_model(models.embeddings().model, LoraConfig(r=2, init_lora_weights="olora", target_modules=["token"]))
