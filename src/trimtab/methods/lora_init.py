"""LoRA's starts that follow from the weight: PiSSA (Meng et al. 2024, arXiv 2404.02948) and OLoRA (Buyukakyuz 2024,
arXiv 2406.01775); and its orthogonal start.

    y = W x + s (B A - B0 A0) x,    A, B starting at A0, B0

PiSSA takes the r largest singular values, s B0 A0 = U_r S_r V_r^T, each factor with their square root; OLoRA W = Q R,
B0 = Q_r, A0 = R_r. The papers subtract s B0 A0 from the weight, which here stays as it is: A0 and B0 are kept beside
it, frozen, and computed again from W when the adapter is loaded, as HF PEFT does to its weight.
"""

import re
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from .. import weights
from ..errors import ConfigError
from ..targets import is_linear

KINDS = r"pissa|pissa_niter_\d+|olora"
DATA_KINDS = ("eva", "corda", "lora_ga", "loftq")  # lora_data.py


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    hf_only: ClassVar[dict[str, Any]] = {}  # HF PEFT's settings not offered here -> the value that switches them off

    @model_validator(mode="before")
    @classmethod
    def _without(cls, given: Any) -> Any:
        switched_off = cls.hf_only.items()
        return dict(given.items() - switched_off) if isinstance(given, dict) else given


class EvaConfig(_Settings):
    """rho: the highest rank of a site is rho r. tau: a site's components are found when two batches agree to this
    cosine. use_label_mask: leave out tokens whose label is label_mask_value. whiten: divide components by the root of
    their singular values. adjust_scaling_factors: keep s = alpha / r where the rank changes."""

    rho: float = Field(default=2.0, ge=1)
    tau: float = Field(default=0.99, ge=-1, le=1)
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True


class CordaConfig(_Settings):
    """corda_method: "ipm" (instruction-previewed) adapts what the data use most, "kpm" (knowledge-preserved) least."""

    hf_only: ClassVar[dict[str, Any]] = {
        "cache_file": None, "covariance_file": None, "prune_temporary_fields": True,
        "use_float16_for_covariance": False, "verbose": False,
    }  # fmt: skip

    corda_method: Literal["ipm", "kpm"] = "ipm"


class LoraGAConfig(_Settings):
    """direction: which of the 2r first singular vectors A0 and B0 get. scale: of B0 "stable" by the fourth root of the
    outputs over the root of stable_gamma, "weight_svd" by W's largest singular value over G's, "gd_scale" both 1 / s,
    "unit" none."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = Field(default=16, ge=1)


class Start(nn.Module):
    """A0 (r, in) and B0 (out, r); in no file."""

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A.contiguous(), persistent=False)
        self.register_buffer("B", B.contiguous(), persistent=False)

    @classmethod
    def of_weight(cls, name: str, site: nn.Module, r: int, scale: float, kind: str) -> Self:
        W = weights.read(site).detach()
        if not is_linear(site) or W.is_meta:
            what = "has no values yet" if W.is_meta else f"is a {type(site).__name__}, not a linear layer"
            raise ConfigError(f"init_lora_weights={kind!r} decomposes weights, but {name} {what}.")
        if r > min(W.shape):
            raise ConfigError(f"{name} is a matrix of rank {min(W.shape)} at most: init_lora_weights={kind!r} "
                              f"has no r={r} parts of it to start from. Closest: {min(W.shape)}.")  # fmt: skip
        with torch.device(W.device):  # also while a plan is made on the meta device
            return cls(*_parts(W.to(weights.master_dtype(W.dtype)), r, scale, kind))


class GivenStart(Start):
    """A start that cannot be computed again: it goes into the file with what is trained."""


def join(adapter: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """After an adapter's state is taken: [A; A0] and [B, -B0], which are an ordinary LoRA."""
    A, B = state[f"{prefix}A"], state[f"{prefix}B"]
    state[f"{prefix}A"] = torch.cat([A, adapter.start.A.to(A)])
    state[f"{prefix}B"] = torch.cat([B, -adapter.start.B.to(B)], 1)


def part(adapter: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before an adapter's state is loaded: what `join` has put together, taken apart."""
    r = len(adapter.A)
    A, B = state[f"{prefix}A"], state[f"{prefix}B"]
    adapter.start.A, adapter.start.B = A[r:].clone(), -B[:, r:]
    state[f"{prefix}A"], state[f"{prefix}B"] = A[:r], B[:, :r]


def _parts(W: Tensor, r: int, scale: float, kind: str) -> tuple[Tensor, Tensor]:
    if kind == "olora":
        Q, R = torch.linalg.qr(W)
        return R[:r], Q[:, :r]
    if kind == "pissa":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:  # randomised: the same numbers each time, since A0 and B0 are not saved
        with torch.random.fork_rng(devices=[W.device] if W.is_cuda else []):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(W, r, niter=int(re.findall(r"\d+", kind)[0]))
        Vh = V.T
    root = (S[:r] / scale).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def orthogonal_(A: Tensor, B: Tensor) -> None:
    """Random A (r, in) and B (out, r) with B A = 0: their rows and columns lie in two halves of an orthogonal basis.

    From https://datta0.github.io/posts/rethink-lora-init; r must be even.
    """
    r = len(A)
    if A.is_meta:
        return
    if r % 2:
        near = r - 1 or 2
        raise ConfigError(f"init_lora_weights='orthogonal' halves the rank: r must be even, not {r}. Closest: {near}.")
    basis = torch.linalg.qr(torch.randn(r, r, dtype=A.dtype, device=A.device))[0]
    with torch.no_grad():
        A.copy_((torch.randn(A[0].numel(), r // 2).to(A) @ basis[0::2]).T.view_as(A) / 10)
        B.copy_((torch.randn(len(B), r // 2).to(B) @ basis[1::2]).view_as(B) / 10)
