"""TinyLoRA (Morris et al. 2026, arXiv 2602.04118): y = W x + b + B (v_1 P_1 + ... + v_u P_u) A x.

B (out, r) and A (r, in) are W's first singular vectors, each times the root of its singular value, saved with the
adapter. The P_i (r, r) are random, frozen and a site's own; they follow from projection_seed and the site's number, and
need not be saved. All that is trained is v (u,), at first zero; sites that follow one another can share one
(weight_tying). On an embedding W is the table as it is stored, (ids, out), and A and B are its.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from .. import weights
from ..adapter import Adapter
from ..targets import FanConfig, is_linear
from .delta import shape_of
from .pair import PairAdapter, PairConfig, Shared


class TinyLoraAdapter(PairAdapter):
    hf_names: ClassVar[dict[str, str]] = {"A": "tinylora_A", "B": "tinylora_B", "P": "tinylora_P"}

    A: Tensor
    B: Tensor
    P: Tensor
    shared: Shared  # v; TinyLoraConfig.adapters puts it in, and P
    group: int  # of the sites with this v

    def __init__(self, site: nn.Module, r: int, dropout: float, seed: int | None) -> None:
        super().__init__()
        out, into = shape_of(site)
        self.embeds = isinstance(site, nn.Embedding)
        self.rank, self.dropout = (r, min(out, into)), dropout
        self.seed = seed  # None where P is in the file; else adapters of two seeds would seem to be of one kind
        r = min(self.rank)
        like = weights.new_parameter(site, 0)
        rows, columns = (into, out) if self.embeds else (out, into)
        self.register_buffer("A", torch.empty(r, columns, dtype=like.dtype, device=like.device))
        self.register_buffer("B", torch.empty(rows, r, dtype=like.dtype, device=like.device))
        if not like.is_meta:
            W = weights.read(site).detach().to(like)
            U, S, V = torch.linalg.svd(W.T if self.embeds else W, full_matrices=False)
            self.A.copy_(S[:r, None].sqrt() * V[:r])
            self.B.copy_(U[:, :r] * S[:r].sqrt())

    def pair(self) -> tuple[Tensor, Tensor]:
        A, B, P = self.A, self.B, self.P.to(self.A)
        R = torch.einsum("i,ijk->jk", self.shared.values.to(A), P)
        return (A.T @ R.T, B.T) if self.embeds else (B @ R, A)

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not self.embeds:
            return super().after(site, x, y)
        B, A = (matrix.to(y) for matrix in self.pair())
        h = F.dropout(weights.linear(site, x, A), self.dropout, self.training)
        return self.with_bias(site, y + F.linear(h, B))

    def hf_shared_key(self, name: str) -> str:
        return f"base_model.tinylora_v.{self.group}" if name == "shared.values" else ""


class TinyLoraConfig(PairConfig, FanConfig):
    """TinyLoRA's settings.

    r: rank. u: length of v. weight_tying: from 0, where each site has a v of its own, to 1, where all sites share one.
    projection_seed: of the P_i. save_projection: save them too. tinylora_dropout: probability, on the input of the
    change. init_weights: True starts at zero, "uniform" uniformly between plus and minus init_v_bound,
    False normally distributed. bias: which biases are trained as well, "none", "all" or those of the targets
    ("tinylora_only").
    """

    peft_type: ClassVar[str] = "TINYLORA"
    trains: ClassVar[str] = "a few numbers between singular vectors"
    relative_rate: ClassVar[float] = 2.5
    when: ClassVar[str] = "Reinforcement learning of what the model nearly knows, with tens of parameters."
    evidence: ClassVar[str] = (
        "Morris et al. report that a language model of about 8 billion parameters learns to solve problems of "
        "mathematics by reinforcement learning with very few numbers, 13 in the extreme, and that supervised training "
        "needs many more. At the start the singular vectors of each weight are computed once."
    )
    hf_prefix: ClassVar[str] = "tinylora_"
    not_in_hf: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    r: int = Field(default=2, ge=1)
    u: int = Field(default=64, ge=1)
    weight_tying: float = Field(default=0.0, ge=0, le=1)
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = Field(default=0.02, gt=0)
    tinylora_dropout: float = Field(default=0.0, ge=0, lt=1)
    bias: Literal["none", "all", "tinylora_only"] = "none"
    init_weights: bool | Literal["uniform"] = True

    def fits(self, module: nn.Module) -> bool:
        return is_linear(module) or isinstance(module, nn.Embedding)

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        own = {name: adapter for name, adapter in made.items() if isinstance(adapter, TinyLoraAdapter)}
        groups = max(1, round(len(own) * (1 - self.weight_tying)))
        size = len(own) // groups
        shared: list[Shared] = []
        for number, (name, adapter) in enumerate(own.items()):
            adapter.group, site = min(number // size, groups - 1), model.get_submodule(name)
            if adapter.group == len(shared):
                shared.append(Shared(self._start(weights.new_parameter(site, self.u))))
            adapter.shared = shared[adapter.group]
            # On the CPU whatever the device, so that a seed means the same numbers everywhere; HF PEFT draws the same.
            generator, r = torch.Generator("cpu").manual_seed(self.projection_seed + number), len(adapter.A)
            P = torch.normal(0.0, 1 / r**0.5, (self.u, r, r), generator=generator, device="cpu")
            place = weights.device(site)
            adapter.register_buffer("P", P if place.type == "meta" else P.to(place), persistent=self.save_projection)
        return made

    def _start(self, v: nn.Parameter) -> nn.Parameter:
        if self.init_weights == "uniform":
            nn.init.uniform_(v, -self.init_v_bound, self.init_v_bound)
        elif self.init_weights:
            nn.init.zeros_(v)
        else:  # no identity: for tests, and for those who load weights anyway
            nn.init.normal_(v)
        return v

    def build(self, name: str, site: nn.Module) -> TinyLoraAdapter:
        seed = None if self.save_projection else self.projection_seed
        return self.biased(TinyLoraAdapter(site, self.r, self.tinylora_dropout, seed), site)
