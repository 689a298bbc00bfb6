"""PSOFT (Wu et al. 2025, arXiv 2505.11235): y = W x + b + B (R - I) A x, R (r, r) orthogonal; B A is W's best rank r.

With W = U S V^T, A (r, in) are the first r rows of V^T and B (out, r) the columns of U S, or with "pissa_init" both
hold the root of S; they are frozen, in no file, and computed again when an adapter is loaded. R = (I + Q) (I - Q)^-1
for a skew-symmetric Q, zero at first, and diag(b) R diag(a) with trained a and b (r,), which start at one.

A singular vector is as good with the other sign, and another machine may find that one, where R would turn other ways.
So the signs are saved as well, under a key that HF PEFT passes over; its own files are trusted to agree.
"""

from collections.abc import Collection
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from .. import weights
from ..adapter import Adapter
from ..errors import ConfigError
from ..targets import FanConfig, is_linear
from .lora_init import Start
from .rotation import cayley, series, skew


class PsoftAdapter(Adapter):
    signs: Tensor
    here: Tensor

    def __init__(self, site: nn.Module, start: Start, config: "PsoftConfig") -> None:
        super().__init__()
        r, orthogonal = config.r, config.psoft_orth
        self.start, self.r, self.orthogonal, self.dropout = start, r, orthogonal, config.psoft_dropout
        self.rank = r, min(start.A.shape[1], len(start.B))
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.limit = config.cayley_neumann_eps
        by_chance = (config.random_seed, config.psoft_svd_lowrank_niter) if config.psoft_svd == "lowrank" else ()
        self.decomposed = config.ab_svd_init, *by_chance  # what R means follows from it
        self.register_buffer("signs", _signs(start.A))  # those that the weights were trained in,
        self.register_buffer("here", _signs(start.A), persistent=False)  # and those of A
        self.weight = weights.new_parameter(site, *((r * (r - 1) // 2,) if orthogonal else (r, r)))
        self.vector_a = weights.new_parameter(site, r) if config.psoft_mag_a else None
        self.vector_b = weights.new_parameter(site, r) if config.psoft_mag_b else None
        if orthogonal:
            nn.init.zeros_(self.weight)
        else:
            nn.init.eye_(self.weight)
        for vector in (self.vector_a, self.vector_b):
            if vector is not None:
                nn.init.ones_(vector)
        if not config.init_weights:  # no identity: for tests, and for those who load weights anyway
            self.weight.data += 0.1 * torch.randn_like(self.weight)

    def _turn(self) -> Tensor:
        """R - I (r, r), in the signs of A and B here."""
        R = self.weight.to(weights.master_dtype(self.weight.dtype))
        if self.orthogonal:
            Q = skew(R[None], self.r)[0]
            if self.limit is not None:
                Q = Q * (self.limit / torch.linalg.vector_norm(Q).clamp_min(self.limit))
            R = cayley(-Q) if self.terms is None else series(Q, self.terms)
        R = R if self.vector_b is None else self.vector_b[:, None] * R
        R = R if self.vector_a is None else R * self.vector_a
        flip = (self.signs * self.here).to(R)
        return flip[:, None] * R * flip - torch.eye(self.r, dtype=R.dtype, device=R.device)

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = F.linear(F.dropout(x, self.dropout, self.training), self.start.A.to(x.dtype))
        return y + F.linear(F.linear(h, self._turn().to(x.dtype)), self.start.B.to(x.dtype)).to(y.dtype)

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        B, A = self.low_rank(site)
        return weight + (B @ A).to(weight.dtype)

    def low_rank(self, site: nn.Module) -> tuple[Tensor, Tensor]:
        turn = self._turn()
        return self.start.B.to(turn), turn @ self.start.A.to(turn)

    def hf_key(self, name: str) -> str:
        return "psoft_signs" if name == "signs" else f"psoft_R.{name}"

    def expect(self, keys: Collection[str]) -> None:
        if not any(key.endswith("psoft_signs") for key in keys):
            self.register_buffer("signs", self.signs, persistent=False)


def _signs(A: Tensor) -> Tensor:
    """Of the largest entry in each row."""
    return A.gather(1, A.abs().argmax(1, keepdim=True)).sign().flatten()


class PsoftConfig(FanConfig):
    """PSOFT's settings.

    r: rank, at least 2 while R is orthogonal. psoft_dropout: probability, on the input of A. ab_svd_init: S with B
    ("psoft_init"), or its root with both ("pissa_init"). psoft_svd: "full", or "lowrank": by chance from
    random_seed, in psoft_svd_lowrank_niter rounds. psoft_orth: keep R orthogonal. psoft_mag_a, psoft_mag_b: train a
    and b. use_cayley_neumann, num_cayley_neumann_terms: a series and its length, or the exact inverse;
    cayley_neumann_eps keeps the norm of Q below it, for the series to converge. psoft_alpha changes nothing: HF
    PEFT divides A and B by what it multiplies with. init_weights=False starts at random. fan_in_fan_out is set by
    itself.
    """

    peft_type: ClassVar[str] = "PSOFT"
    trains: ClassVar[str] = "a rotation of the main directions"
    relative_rate: ClassVar[float] = 4.0
    when: ClassVar[str] = "As OFT, with far fewer parameters: only what matters most in a weight is turned."
    evidence: ClassVar[str] = (
        "Wu et al. try it on 35 language and vision tasks with four models, and report that it needs less memory "
        "and time than the orthogonal methods before it. The weights are decomposed when it is attached and "
        "when it is loaded, which takes its time, and the base must then be the very same."
    )
    hf_prefix: ClassVar[str] = "psoft_"

    r: int = Field(default=32, ge=1)
    psoft_alpha: int | float = Field(default=32, gt=0)
    psoft_dropout: float = Field(default=0.0, ge=0, lt=1)
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: int = Field(default=10, ge=0)
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = Field(default=5, ge=1)
    cayley_neumann_eps: float | None = Field(default=None, gt=0, lt=1)
    init_weights: bool = True

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.psoft_orth and self.r < 2:
            raise ValueError("one direction alone cannot be turned. Closest: r=2, or psoft_orth=False")
        if self.cayley_neumann_eps is not None and not self.use_cayley_neumann:
            raise ValueError("cayley_neumann_eps bounds the series: set use_cayley_neumann=True beside it")
        return self

    def fits(self, module: nn.Module) -> bool:
        return is_linear(module)

    def build(self, name: str, site: nn.Module) -> PsoftAdapter:
        W = weights.read(site).detach()
        if W.is_meta:
            raise ConfigError(f"{name} has no values yet, which PSOFT decomposes. Load the model first.")
        with torch.device(W.device):  # also while a plan is made on the meta device
            start = self._decompose(W.to(weights.master_dtype(W.dtype)))
        return PsoftAdapter(site, start, self)

    def _decompose(self, W: Tensor) -> Start:
        r = self.r
        if self.psoft_svd == "full":
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[W.device] if W.is_cuda else []):
                torch.manual_seed(self.random_seed)
                U, S, V = torch.svd_lowrank(W, min(r, *W.shape), niter=self.psoft_svd_lowrank_niter)
            Vh = V.T
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
        if self.ab_svd_init == "psoft_init":
            return Start(Vh, U * S)
        return Start(S.sqrt()[:, None] * Vh, U * S.sqrt())
