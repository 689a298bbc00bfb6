"""PEANuT (Zhong et al. 2024, arXiv 2410.01870): y = W x + b + s B f(W) x, f a small network that reads the weight.

f(W) (r, in) takes the columns of W one by one, each to r numbers: h = act(A w), then for each of `depth` encoders h =
act(E h), then for each decoder h = act(D h) + what the encoder opposite to it was given. A (r, out), E and D (r, r), B
(out, r). B starts at zero, so that nothing changes at first. W is the base's own, whatever other adapters add to it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from .. import weights
from ..adapter import Adapter
from ..errors import did_you_mean
from ..targets import TargetConfig, is_linear
from .bottleneck import ACTIVATIONS
from .delta import shape_of

# Those of transformers' names that are functions of PyTorch's.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATIONS,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "mish": F.mish,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "swish": F.silu,
}


class PeanutAdapter(Adapter):
    def __init__(self, site: nn.Module, config: "PeanutConfig") -> None:
        super().__init__()
        out, into = shape_of(site)
        r, self.scale, self.act_fn = config.r, config.scaling, config.act_fn
        self.rank = r, min(out, into)
        self.A, self.B = weights.new_parameter(site, r, out), weights.new_parameter(site, out, r)
        self.encoders, self.decoders = (
            nn.ParameterList(weights.new_parameter(site, r, r) for _ in range(config.depth)) for _ in range(2)
        )
        for parameter in self.parameters():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        if config.init_weights:  # else no identity: for tests, and for those who load weights anyway
            nn.init.zeros_(self.B)

    def _network(self, site: nn.Module) -> Tensor:
        """f(W) (r, in), in the type of W."""
        W, act = weights.read(site), FUNCTIONS[self.act_fn]
        h, given = act(self.A.to(W.dtype) @ W), []
        for E in self.encoders:
            given.append(h)
            h = act(E.to(W.dtype) @ h)
        for D in self.decoders:
            h = act(D.to(W.dtype) @ h) + given.pop()
        return h

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = F.linear(x, self._network(site).to(x.dtype))
        return y + (F.linear(h, self.B.to(x.dtype)) * self.scale).to(y.dtype)

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        B, A = self.low_rank(site)
        return weight + (B @ A).to(weight.dtype)

    def low_rank(self, site: nn.Module) -> tuple[Tensor, Tensor]:
        return self.B * self.scale, self._network(site).to(self.B.dtype)

    def hf_key(self, name: str) -> str:
        return f"peanut_{name}.weight"


class PeanutConfig(TargetConfig):
    """PEANuT's settings.

    r: rank, and width of the network. depth: number of encoders, and of decoders. act_fn: "relu", "gelu", "silu" and
    others of transformers' names. scaling: s. init_weights=False starts at random.
    """

    peft_type: ClassVar[str] = "PEANUT"
    trains: ClassVar[str] = "a network from weight to change"
    relative_rate: ClassVar[float] = 0.5
    when: ClassVar[str] = "LoRA's size of file, and a change that follows the weight that it changes; merges as LoRA's."
    evidence: ClassVar[str] = (
        "Zhong et al. report better results than LoRA and others on four benchmarks of language and vision tasks. The "
        "network reads every weight in every step, dequantized on a quantized base: for each site that is as much to "
        "compute as LoRA's A for as many tokens as the weight has columns."
    )
    hf_prefix: ClassVar[str] = "peanut_"

    r: int = Field(default=32, ge=1)
    depth: int = Field(default=0, ge=0)
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    @field_validator("act_fn")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in FUNCTIONS:
            raise ValueError(f"no function is known by that name.{did_you_mean(value, FUNCTIONS)}")
        return value

    def fits(self, module: nn.Module) -> bool:
        return is_linear(module)

    def build(self, name: str, site: nn.Module) -> PeanutAdapter:
        return PeanutAdapter(site, self)
