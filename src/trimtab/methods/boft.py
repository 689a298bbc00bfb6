"""BOFT (Liu et al. 2023, arXiv 2311.06243): y = s (W (x R_m ... R_1)) + b, each R_i orthogonal and block-diagonal
up to a permutation of its own.

With blocks (b, b) the first factor mixes neighbours; factor i groups 2^(i-1) blocks and sorts their half blocks, even
ones first, so that m factors mix 2^(m-1) blocks. The blocks are Cayley transforms (I - Q) (I + Q)^-1 of the
skew-symmetric part Q of trained matrices, zero at first; s (out,) is trained, too, and starts at one.
"""

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .. import weights
from ..errors import ConfigError
from .bitfit import BiasedConfig
from .rotation import RotationAdapter, cayley, drop_blocks, split, turned_features


class BOFTAdapter(RotationAdapter):
    hf_names: ClassVar[dict[str, str]] = {"blocks": "boft_R", "scale": "boft_s", "bias.value": "base_layer.bias"}

    def __init__(self, site: nn.Module, n: int, block: int, factors: int, dropout: float, init: bool) -> None:
        """blocks (m, n / b, b, b)."""
        super().__init__()
        self.block, self.dropout = block, dropout
        self.blocks = weights.new_parameter(site, factors, n // block, block, block)
        shape = weights.layout(site)
        assert shape is not None
        self.scale = weights.new_parameter(site, *((1, shape.out) if shape.kernel else (shape.out, 1)))
        if init:
            nn.init.zeros_(self.blocks)
            nn.init.ones_(self.scale)
        else:  # no identity: for tests, and for those who load weights anyway
            nn.init.normal_(self.blocks, std=0.1)
            nn.init.normal_(self.scale, mean=1, std=0.1)

    def rotate(self, v: Tensor, drop: bool) -> Tensor:
        blocks = self.blocks.to(weights.master_dtype(self.blocks.dtype))
        R = cayley((blocks - blocks.mT) / 2)
        if drop and self.dropout:
            R = drop_blocks(R, self.dropout)
        for factor in reversed(range(len(R))):
            order = butterfly(v.shape[-1], self.block, factor, v.device)
            sorted_back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=v.device))
            h = v[..., sorted_back].reshape(*v.shape[:-1], -1, self.block)
            v = torch.einsum("...kb,kbc->...kc", h, R[factor].to(v.dtype)).flatten(-2)[..., order]
        return v


def butterfly(n: int, block: int, factor: int, device: torch.device) -> Tensor:
    """The order (n,) of factor 0, 1, ...: in each group of 2^factor blocks the even half blocks, then the odd ones."""
    group = block * 2**factor
    half = max(block // 2, 1)
    if factor == 0:
        return torch.arange(n, device=device)
    return torch.arange(n, device=device).view(n // group, group // half // 2, 2, half).transpose(1, 2).flatten()


class BOFTConfig(BiasedConfig):
    """BOFT's settings.

    boft_block_size: b; or, with boft_block_size=0, boft_block_num: the number of blocks. boft_n_butterfly_factor: m.
    boft_dropout: probability with which a block is the identity in a training step. bias: which biases are trained as
    well, "none", "all" or those of the targets ("boft_only"). init_weights=False starts at random.
    """

    peft_type: ClassVar[str] = "BOFT"
    trains: ClassVar[str] = "butterfly factors of orthogonal blocks"
    relative_rate: ClassVar[float] = 8.0
    when: ClassVar[str] = (
        "As OFT, where its blocks mix too few features: m factors mix 2^(m-1) blocks with few parameters more."
    )
    evidence: ClassVar[str] = (
        "Liu et al. report gains over OFT and LoRA on vision, language and text-to-image models with fewer parameters "
        "than OFT. Each factor is one more product and one more solve, so steps are slow."
    )
    hf_prefix: ClassVar[str] = "boft_"

    boft_block_size: int = Field(default=4, ge=0)
    boft_block_num: int = Field(default=0, ge=0)
    boft_n_butterfly_factor: int = Field(default=1, ge=1)
    boft_dropout: float = Field(default=0.0, ge=0, lt=1)
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "boft_only"] = "none"
    init_weights: bool = True

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if bool(self.boft_block_size) == bool(self.boft_block_num):
            raise ValueError("boft_block_num blocks of boft_block_size make up a layer: give one, and 0 for the other")
        return self

    def fits(self, module: nn.Module) -> bool:
        return super().fits(module) and not isinstance(module, nn.Embedding)

    def build(self, name: str, site: nn.Module) -> RotationAdapter:
        n, m = turned_features(site), self.boft_n_butterfly_factor
        if self.boft_block_size:
            block, count = self.boft_block_size, split(name, n, "boft_block_size", self.boft_block_size)
        else:
            block, count = split(name, n, "boft_block_num", self.boft_block_num), self.boft_block_num
        if m > 1 and (block % 2 or count % 2 ** (m - 1)):
            most = 1
            while block % 2 == 0 and count % 2**most == 0:
                most += 1
            raise ConfigError(
                f"{name} has {count} blocks of {block}: boft_n_butterfly_factor={m} needs even blocks, in a number "
                f"that 2^{m - 1} divides. Closest: {most}."
            )
        return self.with_bias(BOFTAdapter(site, n, block, m, self.boft_dropout, self.init_weights), site)
