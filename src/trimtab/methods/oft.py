"""OFT (Qiu et al. 2023, arXiv 2306.07280; OFTv2, Qiu et al. 2025, arXiv 2506.19847): y = W (x R) + b.

R is block-diagonal with orthogonal blocks (b, b), each given by the b (b - 1) / 2 numbers above the diagonal of a
skew-symmetric Q, at first zero: R = (I - Q) (I + Q)^-1. OFTv2's series, I + 2 Q + 2 Q^2 + ... + Q^k, needs no solver;
it stands for (I + Q) (I - Q)^-1, the other sense of turning, and its last term counts once, as in HF PEFT. COFT keeps
the norm of every Q below eps / sqrt(number of blocks). HF PEFT does that by writing to the parameters in every call;
here the forward pass uses the shortened Q and hands its gradient to the parameters as they are.
"""

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .. import weights
from .biased import BiasedConfig
from .rotation import RotationAdapter, cayley, drop_blocks, series, skew, split, turned_features


class OFTAdapter(RotationAdapter):
    def __init__(self, site: nn.Module, n: int, block: int, config: "OFTConfig") -> None:
        """upper (blocks, b (b - 1) / 2), with one row if they are shared."""
        super().__init__()
        self.n, self.block = n, block
        self.dropout = config.module_dropout
        self.limit = config.eps if config.coft else math.inf
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.embeds = isinstance(site, nn.Embedding)
        self.upper = weights.new_parameter(site, 1 if config.block_share else n // block, block * (block - 1) // 2)
        if config.init_weights:
            nn.init.zeros_(self.upper)
        else:  # no identity: for tests, and for those who load weights anyway
            nn.init.normal_(self.upper, std=0.1)

    def _blocks(self) -> Tensor:
        """R as (blocks, b, b), or (1, b, b) if they are shared."""
        upper = self.upper.to(weights.master_dtype(self.upper.dtype))
        Q = skew(upper, self.block)
        if self.limit < math.inf:
            limit = self.limit / math.sqrt(len(upper))
            length = torch.linalg.vector_norm(Q.detach(), dim=(1, 2), keepdim=True)
            Q = Q + (Q * (limit / length).clamp(max=1) - Q).detach()
        return cayley(Q) if self.terms is None else series(Q, self.terms)

    def rotate(self, v: Tensor, drop: bool) -> Tensor:
        R = self._blocks().expand(self.n // self.block, -1, -1)
        if drop and self.dropout:
            R = drop_blocks(R, self.dropout)
        return torch.einsum("...kb,kbc->...kc", v.reshape(*v.shape[:-1], -1, self.block), R.to(v.dtype)).flatten(-2)

    def hf_key(self, name: str) -> str:
        if name == "bias.value":
            return "base_layer.bias"
        return "oft_embedding_R.weight" if self.embeds else "oft_R.weight"


class OFTConfig(BiasedConfig):
    """OFT's settings.

    oft_block_size: b; or, with oft_block_size=0, r: the number of blocks. module_dropout: probability with which a
    block is the identity in a training step. coft, eps: bound the turning. block_share: one block for all.
    use_cayley_neumann, num_cayley_neumann_terms: the series and its length, or the exact inverse. bias: which biases
    are trained as well, "none", "all" or those of the targets ("oft_only"). init_weights=False starts at random.
    """

    peft_type: ClassVar[str] = "OFT"
    trains: ClassVar[str] = "orthogonal blocks"
    when: ClassVar[str] = (
        "Keeping what the base knows: image generation with a few pictures of a subject, or fine-tuning that must not "
        "drift."
    )
    evidence: ClassVar[str] = (
        "Turning all inputs of a layer alike keeps the angles between its neurons; Qiu et al. report better images "
        "and faster convergence on text-to-image models than the methods before. OFTv2 turns the input instead of the "
        "weight, as is done here, and reports up to 10 times faster training with up to 3 times less memory than OFT. "
        "Blocks must divide the width, and lengths cannot be learned."
    )
    hf_prefix: ClassVar[str] = "oft_"

    r: int = Field(default=0, ge=0)
    oft_block_size: int = Field(default=32, ge=0)
    module_dropout: float = Field(default=0.0, ge=0, lt=1)
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = Field(default=6e-5, gt=0)
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = Field(default=5, ge=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if bool(self.r) == bool(self.oft_block_size):
            raise ValueError("r blocks of oft_block_size make up a layer: give one of the two, and 0 for the other")
        return self

    def build(self, name: str, site: nn.Module) -> RotationAdapter:
        n = turned_features(site)
        if self.oft_block_size:
            split(name, n, "oft_block_size", self.oft_block_size)
        block = self.oft_block_size or split(name, n, "r", self.r)
        return self.biased(OFTAdapter(site, n, block, self), site)
