"""Uni-LoRA (Li et al. 2025, arXiv 2506.00799): y = W x + b + B A x, all numbers of all A and B taken from one vector.

The vector (d,) is all that is trained. Each entry of each site's A (r, in) and B (out, r) is one of its d numbers,
divided by the root of how many entries that number has, so that lengths are kept. Which entry takes which number is
random and follows from proj_seed; all numbers have equally many, up to one. The vector starts at random, so that the
change is small at first, but not zero.
"""

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from .. import weights
from ..adapter import Adapter
from ..errors import ConfigError
from ..targets import FanConfig
from .delta import shape_of
from .pair import PairAdapter, PairConfig, Shared


class Projection(nn.Module):
    """index (D,): which of d numbers each entry takes; scale (d,). One object that all adapters hold."""

    index: Tensor
    scale: Tensor

    def __init__(self, d: int, entries: int, seed: int) -> None:
        super().__init__()
        random = np.random.default_rng(seed)  # asked as HF PEFT asks it, so that a seed means the same
        rest = random.choice(d, size=entries % d, replace=False)
        index = np.concatenate([np.repeat(np.arange(d), entries // d), rest])
        random.shuffle(index)
        self.register_buffer("index", torch.tensor(index, dtype=torch.int32, device="cpu"), persistent=False)
        counts = torch.bincount(self.index, minlength=d).clamp(min=1)
        self.register_buffer("scale", counts.float().rsqrt(), persistent=False)


class UniLoraAdapter(PairAdapter):
    hf_shared: ClassVar[dict[str, str]] = {"vector.values": "base_model.unilora_theta_d"}

    vector: Shared  # UniLoraConfig.adapters puts these in
    projection: Projection
    start: int  # the first of its entries that is of A

    def __init__(self, site: nn.Module, r: int, seed: int, dropout: float) -> None:
        super().__init__()
        self.out, self.into = shape_of(site)
        self.rank, self.seed, self.dropout = (r, min(self.out, self.into)), seed, dropout
        self.sizes = [r * self.into, self.out * r]

    def pair(self) -> tuple[Tensor, Tensor]:
        scaled = self.vector.values * self.projection.scale.to(self.vector.values)
        places = self.projection.index[self.start : self.start + sum(self.sizes)]
        A, B = torch.split(scaled.index_select(0, places), self.sizes)
        return B.view(self.out, -1), A.view(-1, self.into)


class UniLoraConfig(PairConfig, FanConfig):
    """Uni-LoRA's settings.

    r: rank. theta_d_length: d. proj_seed: of which entry takes which number. unilora_dropout: probability, on the
    input of the change. init_theta_d_bound: the vector starts uniformly between plus and minus this, and with
    init_weights=False normally distributed. bias: which biases are trained as well, "none", "all" or those of the
    targets ("unilora_only").
    """

    peft_type: ClassVar[str] = "UNILORA"
    trains: ClassVar[str] = "one vector for all layers"
    relative_rate: ClassVar[float] = 64.0
    when: ClassVar[str] = "As few parameters as one likes, for a model of any size."
    evidence: ClassVar[str] = (
        "Li et al. report results like LoRA's on GLUE, mathematics and instruction tuning with far fewer parameters "
        "than the methods before need. A step computes as much as LoRA's."
    )
    hf_prefix: ClassVar[str] = "unilora_"
    hf_only: ClassVar[dict[str, Any]] = {"save_indices": False}
    not_in_hf: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    r: int = Field(default=4, ge=1)
    proj_seed: int = Field(default=42, ge=0)
    theta_d_length: int = Field(default=256, ge=1)
    unilora_dropout: float = Field(default=0.0, ge=0, lt=1)
    bias: Literal["none", "all", "unilora_only"] = "none"
    init_theta_d_bound: float = Field(default=0.02, gt=0)
    init_weights: bool = True

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        own = {name: adapter for name, adapter in made.items() if isinstance(adapter, UniLoraAdapter)}
        entries, site = sum(sum(adapter.sizes) for adapter in own.values()), model.get_submodule(next(iter(own)))
        values = weights.new_parameter(site, self.theta_d_length)
        if self.theta_d_length > entries and not values.is_meta:  # a file may bring numbers that nothing takes
            raise ConfigError(f"All A and B have {entries} entries: theta_d_length={self.theta_d_length} is too much. "
                              f"Closest: {entries}.")  # fmt: skip
        if self.init_weights:
            nn.init.uniform_(values, -self.init_theta_d_bound, self.init_theta_d_bound)
        else:
            nn.init.normal_(values)
        vector, projection = Shared(values), Projection(self.theta_d_length, entries, self.proj_seed)
        start, projection = 0, weights.beside(site, projection)
        for adapter in own.values():
            adapter.vector, adapter.projection, adapter.start = vector, projection, start
            start += sum(adapter.sizes)
        return made

    def build(self, name: str, site: nn.Module) -> UniLoraAdapter:
        return self.biased(UniLoraAdapter(site, self.r, self.proj_seed, self.unilora_dropout), site)
