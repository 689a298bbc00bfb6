"""C3A (Chen et al. 2024, arXiv 2407.19342): y = W x + b + D x, D of circulant blocks.

D (out, in) has blocks (c, c) with c = block_size, and each is given by one row w (c,), which every next row has moved
on by one: block[k, l] = w[(l - k) mod c] / in. The product with a block is a circular correlation, so it is computed by
the fast Fourier transform, without D; its rank is not bounded by the number of parameters, out * in / c.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import weights
from ..adapter import Adapter
from ..errors import ConfigError, closest_divisor
from ..targets import check_patterns, is_linear, pattern_value
from .biased import BiasedAdapter, BiasedConfig
from .bitfit import own_bias
from .delta import shape_of


class C3AAdapter(BiasedAdapter):
    hf_names: ClassVar[dict[str, str]] = {"kernel": "c3a_kernel"}

    def __init__(self, site: nn.Module, block: int, init: bool | str) -> None:
        """kernel (out / c, in / c, c)."""
        super().__init__()
        out, self.into = shape_of(site)
        self.kernel = weights.new_parameter(site, out // block, self.into // block, block)
        if init is True:
            nn.init.zeros_(self.kernel)
        elif init == "gaussian":
            nn.init.normal_(self.kernel)
        else:
            bound = math.sqrt(1 / self.into if init == "kaiming_uniform" else 6 / (out + self.into))
            nn.init.uniform_(self.kernel, -bound, bound)

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        exact = weights.master_dtype(x.dtype)  # half precision has no Fourier transform
        block = self.kernel.shape[-1]
        X = torch.fft.rfft(x.to(exact).reshape(*x.shape[:-1], -1, block))
        K = torch.fft.rfft(self.kernel.to(exact)).conj()
        Dx = torch.fft.irfft(torch.einsum("...nf,mnf->...mf", X, K), n=block).flatten(-2) / self.into
        return self.with_bias(site, y + Dx.to(y.dtype))

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        place = torch.arange(self.kernel.shape[-1], device=self.kernel.device)
        blocks = self.kernel[..., (place - place[:, None]) % len(place)]  # (out / c, in / c, c, c)
        return weight + (blocks.transpose(1, 2).flatten(2).flatten(0, 1) / self.into).to(weight.dtype)

    def neutral(self, site: nn.Module) -> dict[str, Tensor]:
        bias = own_bias(site) if self.bias is not None else None
        return {"kernel": torch.zeros_like(self.kernel)} | ({} if bias is None else {"bias.value": bias})


class C3AConfig(BiasedConfig):
    """C3A's settings.

    block_size: c, which must divide the inputs and the outputs of all targets; larger ones mean fewer parameters.
    block_size_pattern: other sizes for the modules a key (a regular expression for the end of the name) means. bias:
    which biases are trained as well, "none", "all" or those of the targets ("c3a_only"). init_weights: a random start,
    "xavier_uniform" (as False), "kaiming_uniform" or "gaussian", which is small but changes the model; True starts at
    zero.
    """

    peft_type: ClassVar[str] = "C3A"
    trains: ClassVar[str] = "circulant blocks"
    relative_rate: ClassVar[float] = 80.0
    when: ClassVar[str] = "Changes of high rank from few parameters, where widths have a large common divisor."
    evidence: ClassVar[str] = (
        "Chen et al. report better results than LoRA's with fewer parameters on GLUE, instruction tuning and images. "
        "The learning rate must be much higher than LoRA's. The block size must divide all widths, and the Fourier "
        "transform works in float32 whatever the base."
    )
    hf_prefix: ClassVar[str] = "c3a_"
    not_in_hf: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})
    example: ClassVar[dict[str, Any]] = {"block_size": 64}

    block_size: int = Field(default=256, ge=1)
    block_size_pattern: dict[str, int] = {}
    bias: Literal["none", "all", "c3a_only"] = "none"
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = "xavier_uniform"

    def fits(self, module: nn.Module) -> bool:
        return is_linear(module)

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        targets = [name for name, adapter in made.items() if isinstance(adapter, C3AAdapter)]
        check_patterns("block_size_pattern", self.block_size_pattern, targets)
        return made

    def build(self, name: str, site: nn.Module) -> C3AAdapter:
        block, sizes = pattern_value(self.block_size_pattern, name, self.block_size), shape_of(site)
        if block < 1 or any(size % block for size in sizes):
            raise ConfigError(f"{name} has {sizes[1]} inputs and {sizes[0]} outputs: block_size={block} does not "
                              f"divide both. Closest: {closest_divisor(block, *sizes)}.")  # fmt: skip
        return self.biased(C3AAdapter(site, block, self.init_weights), site)
