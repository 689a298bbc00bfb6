"""HRA (Yuan et al. 2024, arXiv 2405.17484): W' = W H_1 H_2 ... H_r, each H_i = I - 2 u_i u_i^T / |u_i|^2 a reflection.

That is y = W (x H_r ... H_1) + b. The u_i start as equal pairs, whose reflections undo each other, so that nothing
changes at first. With apply_GS they are made orthogonal first (the paper's limit of strong regularisation); then
W' = W (I - 2 U U^T), which is the identity for no U.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import weights
from ..errors import ConfigError
from .bitfit import BiasedConfig
from .rotation import RotationAdapter, turned_features


class HRAAdapter(RotationAdapter):
    hf_names: ClassVar[dict[str, str]] = {"u": "hra_u", "bias.value": "base_layer.bias"}

    def __init__(self, site: nn.Module, r: int, orthogonal: bool, init: bool) -> None:
        """u (n, r)."""
        super().__init__()
        self.orthogonal = orthogonal
        n = turned_features(site)
        self.u = weights.new_parameter(site, n, r)
        self.rank = r, n  # n reflections make any rotation there is
        nn.init.kaiming_uniform_(self.u, a=math.sqrt(5))
        if init and not orthogonal:  # else no identity
            if r % 2 and not self.u.is_meta:  # a file may bring any number of them
                raise ConfigError(f"HRA starts with pairs of reflections: r must be even, not {r}. Closest: "
                                  f"{r - 1 or 2}. Or start at random with init_weights=False.")  # fmt: skip
            self.u.data = self.u.data[:, : (r + 1) // 2].repeat_interleave(2, dim=1)[:, :r]

    def rotate(self, v: Tensor, drop: bool) -> Tensor:
        u = self.u.to(weights.master_dtype(self.u.dtype))
        if self.orthogonal:
            U: Tensor = torch.linalg.qr(u)[0].to(v.dtype)
            return v - 2 * (v @ U) @ U.T
        u = (u / u.norm(dim=0)).to(v.dtype)
        for column in reversed(u.unbind(1)):
            v = v - 2 * (v @ column)[..., None] * column
        return v


class HRAConfig(BiasedConfig):
    """HRA's settings.

    r: number of reflections, even. apply_GS: make their vectors orthogonal. bias: which biases are trained as well,
    "none", "all" or those of the targets ("hra_only"). init_weights=False starts at random.
    """

    peft_type: ClassVar[str] = "HRA"
    trains: ClassVar[str] = "vectors of reflections"
    relative_rate: ClassVar[float] = 4.0
    when: ClassVar[str] = "Between LoRA and OFT: an orthogonal change whose size is set by a rank, on any width."
    evidence: ClassVar[str] = (
        "Yuan et al. report better results than LoRA, OFT and others with fewer parameters on language models and "
        "image generation. The reflections follow one another, so time grows with r."
    )
    hf_prefix: ClassVar[str] = "hra_"

    r: int = Field(default=8, ge=1)
    apply_GS: bool = False  # noqa: N815 - HF PEFT's name
    bias: Literal["none", "all", "hra_only"] = "none"
    init_weights: bool = True

    def fits(self, module: nn.Module) -> bool:
        return super().fits(module) and not isinstance(module, nn.Embedding)

    def build(self, name: str, site: nn.Module) -> RotationAdapter:
        return self.with_bias(HRAAdapter(site, self.r, self.apply_GS, self.init_weights), site)
