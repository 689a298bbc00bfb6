"""MiSS (Kang and Yin 2024, arXiv 2409.15371): y = W x + b + D^T (x_1 + x_2 + ...), x cut into shards x_i of length r.

D (r, out) is one block that all shards of the weight share: W' = W + [D^T D^T ...], the last one cut off where r does
not divide the inputs. It starts at zero. With init_weights="mini" D is (r, mini_r), repeated along the outputs. With
"bat" (Bat, of the same authors) each r rows W_i of the weight have a block D_i (r, r) of their own, and every square
shard W_ij of theirs becomes W_ij + W_ij D_i + D_i.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from .. import weights
from ..adapter import Adapter
from ..errors import ConfigError, closest_divisor
from ..targets import is_linear
from .biased import BiasedAdapter, BiasedConfig
from .delta import shape_of


class MissAdapter(BiasedAdapter):
    hf_names: ClassVar[dict[str, str]] = {"D": "miss_block"}

    def __init__(self, site: nn.Module, r: int, width: int, dropout: float, init: bool) -> None:
        """D (r, width), width the outputs or mini_r."""
        super().__init__()
        self.dropout = dropout
        self.out, self.into = shape_of(site)
        self.rank = r, self.into  # D of all inputs makes any change there is
        self.D = weights.new_parameter(site, r, width)
        if init:
            nn.init.zeros_(self.D)
        else:  # no identity: for tests, and for those who load weights anyway
            nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        r, width = self.D.shape
        padded = F.pad(F.dropout(x, self.dropout, self.training), (0, -self.into % r))
        h = padded.reshape(*x.shape[:-1], -1, r).sum(-2) @ self.D.to(x.dtype)  # (..., width)
        return self.with_bias(site, y + h.repeat(*[1] * (h.dim() - 1), self.out // width).to(y.dtype))

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        B, A = self.low_rank(site)
        return weight + (B @ A).to(weight.dtype)

    def low_rank(self, site: nn.Module) -> tuple[Tensor, Tensor]:
        r, width = self.D.shape
        A = torch.eye(r, dtype=self.D.dtype, device=self.D.device).repeat(1, -(-self.into // r))[:, : self.into]
        return self.D.T.repeat(self.out // width, 1), A

    def neutral(self, site: nn.Module) -> dict[str, Tensor]:
        return {"D": torch.zeros_like(self.D)} if self.bias is None else {}


class BatAdapter(BiasedAdapter):
    hf_names: ClassVar[dict[str, str]] = {"D": "miss_block"}

    def __init__(self, site: nn.Module, r: int, dropout: float) -> None:
        """D (out / r, r, r)."""
        super().__init__()
        self.dropout = dropout
        self.D = weights.new_parameter(site, shape_of(site)[0] // r, r, r)
        nn.init.zeros_(self.D)

    def _change(self, site: nn.Module) -> Tensor:
        """(out, in), all W_ij D_i + D_i."""
        W, r = weights.read(site).to(self.D.dtype), self.D.shape[-1]
        shards = W.reshape(len(self.D), r, -1, r)  # (out / r, r, in / r, r)
        return (torch.einsum("iajb,ibc->iajc", shards, self.D) + self.D[:, :, None]).reshape(W.shape)

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        return self.with_bias(site, y + F.linear(x, self._change(site).to(x.dtype)).to(y.dtype))

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        return weight + self._change(site).to(weight.dtype)


class MissConfig(BiasedConfig):
    """MiSS's settings.

    r: length of a shard, and rank. miss_dropout: probability, on the input of the change. init_weights: True, or the
    variant "mini" or "bat", all starting at zero; False starts the first one at random. mini_r: the columns of "mini"'s
    block, which must divide the outputs. bias: which biases are trained as well, "none", "all" or those of the targets
    ("MiSS_only").
    """

    peft_type: ClassVar[str] = "MISS"
    trains: ClassVar[str] = "one block that all shards share"
    relative_rate: ClassVar[float] = 0.25
    when: ClassVar[str] = "In place of LoRA where time and memory count: half of its pair, the other half is a sum."
    evidence: ClassVar[str] = (
        "Kang and Yin report better results than LoRA and its variants with faster convergence and less memory on "
        "language models of several billion parameters. Bat reads the weight in every step, which costs what "
        "MiSS saves."
    )
    hf_prefix: ClassVar[str] = "miss_"

    r: int = Field(default=64, ge=1)
    miss_dropout: float = Field(default=0.0, ge=0, lt=1)
    mini_r: int = Field(default=1, ge=1)
    bias: Literal["none", "all", "MiSS_only"] = "none"
    init_weights: bool | Literal["bat", "mini"] = True

    def fits(self, module: nn.Module) -> bool:
        return is_linear(module)

    def build(self, name: str, site: nn.Module) -> Adapter:
        out, into = shape_of(site)
        if self.init_weights == "bat":
            _check_divides(name, "r", self.r, math.gcd(out, into), "cuts the weight into squares")
            return self.biased(BatAdapter(site, self.r, self.miss_dropout), site)
        if self.init_weights == "mini":
            _check_divides(name, "mini_r", self.mini_r, out, "repeats its block along the outputs")
        width = self.mini_r if self.init_weights == "mini" else out
        return self.biased(MissAdapter(site, self.r, width, self.miss_dropout, bool(self.init_weights)), site)


def _check_divides(name: str, setting: str, wanted: int, whole: int, why: str) -> None:
    if whole % wanted:
        near = closest_divisor(wanted, whole)
        raise ConfigError(f"{name}: {setting}={wanted} {why}, and does not divide {whole}. Closest: {near}.")
