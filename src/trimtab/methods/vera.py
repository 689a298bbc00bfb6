"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): y = W x + l_b * (B (l_d * (A x))).

A (r, in) and B (out, r) are random, frozen and shared by all sites, each of which takes as many of their columns and
rows as it has inputs and outputs; a site trains l_d (r,), started at d_initial, and l_b (out,), started at zero.
A and B are saved once, or with save_projection=False not at all: they follow from projection_prng_key.
"""

import math
from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from .. import weights
from ..adapter import Adapter
from ..targets import FanConfig, is_linear
from .biased import BiasedAdapter, BiasedConfig


class Projections(nn.Module):
    """A (rows, in) and B (out, r), wide enough for every site; one object that all adapters hold."""

    A: Tensor
    B: Tensor

    def __init__(self, rows: int, into: int, out: int, r: int, seed: int, saved: bool) -> None:
        super().__init__()
        self.seed = None if saved else seed  # or adapters of two seeds would seem to be of one kind
        # On the CPU whatever the device, so that a seed means the same numbers everywhere; HF PEFT draws the same.
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, shape in (("A", (rows, into)), ("B", (out, r))):
            bound = math.sqrt(6 / shape[1])  # Kaiming's uniform distribution
            drawn = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn, persistent=saved)


class ProjectedAdapter(BiasedAdapter):
    """What VeRA and PVeRA have in common: l_d (rows,) and l_b (out,) on either side of `inner`."""

    shared: Projections  # one for all sites: ProjectedConfig.adapters knows how wide, and puts it in

    def __init__(self, site: nn.Module, rows: int, d_initial: float, dropout: float, init: bool) -> None:
        super().__init__()
        shape = weights.layout(site)
        assert shape is not None
        self.out, self.into, self.dropout = shape.out, shape.into, dropout  # and no `rank`: the paper's exceed W's
        self.lambda_b = weights.new_parameter(site, shape.out)
        self.lambda_d = weights.new_parameter(site, rows)
        if init:
            nn.init.zeros_(self.lambda_b)
            nn.init.constant_(self.lambda_d, d_initial)
        else:  # no identity: for tests, and for those who load weights anyway
            nn.init.ones_(self.lambda_b)
            nn.init.normal_(self.lambda_d)

    @abstractmethod
    def inner(self, h: Tensor) -> Tensor:
        """What B takes (..., r), from l_d * (A x) (..., rows)."""

    def _own(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """A (rows, in) and B (out, r) of this site, in the type and on the device of another tensor."""
        return self.shared.A[:, : self.into].to(like), self.shared.B[: self.out].to(like)

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        A, B = self._own(x)
        h = F.linear(F.dropout(x, self.dropout, self.training), A) * self.lambda_d.to(x.dtype)
        return self.with_bias(site, y + (F.linear(self.inner(h), B) * self.lambda_b.to(x.dtype)).to(y.dtype))

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        B, A = self.low_rank(site)
        return weight + (B @ A).to(weight.dtype)

    def low_rank(self, site: nn.Module) -> tuple[Tensor, Tensor]:
        """Of the first r rows of A: all, or those of the mean."""
        A, B = self._own(self.lambda_b)
        r = B.shape[1]
        return self.lambda_b[:, None] * B, self.lambda_d[:r, None] * A[:r]


class VeraAdapter(ProjectedAdapter):
    hf_names: ClassVar[dict[str, str]] = {
        "lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"
    }  # fmt: skip
    hf_shared: ClassVar[dict[str, str]] = {"shared.A": "base_model.vera_A", "shared.B": "base_model.vera_B"}

    def inner(self, h: Tensor) -> Tensor:
        return h


class ProjectedConfig(BiasedConfig, FanConfig):
    """Settings that VeRA and PVeRA share.

    r: rank, large (hundreds), since only scales of A's rows and of the outputs are trained. projection_prng_key: the
    seed of A and B. save_projection: save them too. d_initial: where l_d starts. init_weights=False starts at random.
    fan_in_fan_out is set by itself.
    """

    not_in_hf: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    r: int = Field(default=256, ge=1)
    projection_prng_key: int = 0
    save_projection: bool = True
    d_initial: float = 0.1
    init_weights: bool = True

    def fits(self, module: nn.Module) -> bool:
        return is_linear(module)

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        own = {name: adapter for name, adapter in made.items() if isinstance(adapter, ProjectedAdapter)}
        out, into = max(adapter.out for adapter in own.values()), max(adapter.into for adapter in own.values())
        rows = len(next(iter(own.values())).lambda_d)
        shared = Projections(rows, into, out, self.r, self.projection_prng_key, self.save_projection)
        shared = weights.beside(model.get_submodule(next(iter(own))), shared)
        for adapter in own.values():
            adapter.shared = shared
        return made


class VeraConfig(ProjectedConfig):
    """VeRA's settings; those of ProjectedConfig, and:

    vera_dropout: probability, on the input of A. bias: which biases are trained as well, "none", "all" or those of the
    targets ("vera_only").
    """

    peft_type: ClassVar[str] = "VERA"
    trains: ClassVar[str] = "two vectors of scales"
    relative_rate: ClassVar[float] = 20.0
    when: ClassVar[str] = "Many adapters of one base, where LoRA's files are still too large."
    evidence: ClassVar[str] = (
        "Kopiczko et al. report LoRA's results on GLUE, E2E and instruction tuning with about ten times fewer "
        "parameters. The rank must be high (hundreds), so a step computes as much as LoRA of that rank does, and the "
        "learning rate higher than LoRA's. One seed or one pair of matrices serves all sites."
    )
    hf_prefix: ClassVar[str] = "vera_"

    vera_dropout: float = Field(default=0.0, ge=0, lt=1)
    bias: Literal["none", "all", "vera_only"] = "none"

    def build(self, name: str, site: nn.Module) -> VeraAdapter:
        return self.biased(VeraAdapter(site, self.r, self.d_initial, self.vera_dropout, self.init_weights), site)
