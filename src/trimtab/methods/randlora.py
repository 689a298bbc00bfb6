"""RandLoRA (Albert et al. 2025, arXiv 2502.00987): y = W x + b + s (B_1 L_1 A G_1 + ... + B_n L_n A G_n) x.

A (r, short) and the B_i (long, r) are random, frozen and shared by all sites, of which each takes as many columns and
rows as its shorter and longer side have; where outputs are the shorter side, the sum is transposed. s = alpha / r. With
n = short / r, rounded up, it reaches full rank. Trained are the diagonals, L_i (r,), at first zero, and G_i (short,).
As in HF PEFT the columns of the B_i are counted one B after the other and the rows of the L_i A G_i by their row first;
what is random may be in any order. A and the B_i are saved once, or with save_projection=False not at all: they follow
from projection_prng_key.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import weights
from ..adapter import Adapter
from ..targets import FanConfig
from .delta import shape_of
from .pair import PairAdapter, PairConfig


class Bases(nn.Module):
    """A (r, 1, short) and B (long, n, r), of standard deviation 1; one object that all adapters hold."""

    A: Tensor
    B: Tensor

    def __init__(self, short: int, long: int, r: int, seed: int, sparsity: float | None, saved: bool) -> None:
        """sparsity: one of as many entries is not zero; None for entries of a uniform distribution."""
        super().__init__()
        self.drawn = None if saved else (seed, sparsity or 0)  # or adapters of two seeds would seem to be of one kind
        # On the CPU whatever the device, so that a seed means the same numbers everywhere; HF PEFT draws the same.
        generator = torch.Generator("cpu").manual_seed(seed)
        n = math.ceil(short / r)
        if sparsity is None:  # HF PEFT draws in this type
            shapes = [(r, 1, short)] + n * [(long, 1, r)]
            parts = [torch.empty(shape, dtype=torch.bfloat16, device="cpu") for shape in shapes]
            A, *columns = (nn.init.kaiming_uniform_(part, a=math.sqrt(5), generator=generator) for part in parts)
            B = torch.cat(columns, dim=1)
        else:
            A = torch.rand(r, 1, short, generator=generator, device="cpu")
            B = torch.rand(long, n, r, generator=generator, device="cpu")
            tail = 1 / (2 * sparsity)
            A, B = (U.gt(1 - tail).float() - U.lt(tail).float() for U in (A, B))
        self.register_buffer("A", (A / A.std()).float(), persistent=saved)
        self.register_buffer("B", (B / B.std()).float(), persistent=saved)


class RandLoraAdapter(PairAdapter):
    hf_names: ClassVar[dict[str, str]] = {"L": "randlora_lambda", "G": "randlora_gamma"}
    hf_shared: ClassVar[dict[str, str]] = {"shared.A": "base_model.randlora_A", "shared.B": "base_model.randlora_B"}

    shared: Bases  # RandLoraConfig.adapters knows how large, and puts it in

    def __init__(self, site: nn.Module, r: int, alpha: float, dropout: float, init: bool) -> None:
        """L (r, n) and G (n, short)."""
        super().__init__()
        self.out, self.into = shape_of(site)
        self.scale, self.dropout = alpha / r, dropout
        short = min(self.out, self.into)
        n = math.ceil(short / r)
        self.L, self.G = weights.new_parameter(site, r, n), weights.new_parameter(site, n, short)
        if init:
            nn.init.zeros_(self.L)
            nn.init.constant_(self.G, 1 / max(self.G.shape))
        else:  # no identity: for tests, and for those who load weights anyway
            nn.init.normal_(self.L)
            nn.init.constant_(self.G, 1 / max(self.out, self.into))

    def pair(self) -> tuple[Tensor, Tensor]:
        n, short = self.G.shape
        A = self.L[:, :, None] * self.shared.A[:, :, :short].to(self.L) * self.G  # (r, n, short)
        B = self.shared.B[: max(self.out, self.into), :n].to(self.L)  # (long, n, r)
        rows, columns = A.flatten(0, 1) * self.scale, B.flatten(1)
        return (columns, rows) if self.into <= self.out else (rows.T, columns.T)

    def low_rank(self, site: nn.Module) -> None:
        return None  # the rank is full


class RandLoraConfig(PairConfig, FanConfig):
    """RandLoRA's settings.

    r: rank of each of the products, so that a larger one means fewer of them and fewer parameters. randlora_alpha:
    alpha. randlora_dropout: probability, on the input of the change. projection_prng_key: the seed of A and the B_i.
    save_projection: save them too. sparse, very_sparse: two of three of their entries are zero, or all but one of the
    root of the largest layer's shorter side. bias: which biases are trained as well, "none", "all" or those of the
    targets ("randlora_only"). init_weights=False starts at random.
    """

    peft_type: ClassVar[str] = "RANDLORA"
    trains: ClassVar[str] = "scales of random low-rank products"
    relative_rate: ClassVar[float] = 0.25
    when: ClassVar[str] = "A change of full rank from as many parameters as LoRA has, where LoRA's rank is the limit."
    evidence: ClassVar[str] = (
        "Albert et al. report that it closes most of the gap between LoRA and full fine-tuning on vision, language and "
        "vision-language models with as many parameters. A step computes as much as a LoRA of full rank does."
    )
    hf_prefix: ClassVar[str] = "randlora_"
    not_in_hf: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    r: int = Field(default=32, ge=1)
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = Field(default=0.0, ge=0, lt=1)
    randlora_alpha: int | float = 640
    bias: Literal["none", "all", "randlora_only"] = "none"
    init_weights: bool = True

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        own = {name: adapter for name, adapter in made.items() if isinstance(adapter, RandLoraAdapter)}
        short, long = sorted(max(getattr(adapter, side) for adapter in own.values()) for side in ("out", "into"))
        sparsity = math.sqrt(short) if self.very_sparse else 3 if self.sparse else None
        shared = Bases(short, long, self.r, self.projection_prng_key, sparsity, self.save_projection)
        shared = weights.beside(model.get_submodule(next(iter(own))), shared)
        for adapter in own.values():
            adapter.shared = shared
        return made

    def build(self, name: str, site: nn.Module) -> RandLoraAdapter:
        adapter = RandLoraAdapter(site, self.r, self.randlora_alpha, self.randlora_dropout, self.init_weights)
        return self.biased(adapter, site)
