"""WaveFT (Bilican et al. 2025, arXiv 2505.12532): y = W x + b + s IDWT(C) x, C zero but for n trained numbers.

IDWT is one level of the two-dimensional inverse wavelet transform: each quarter of C holds the coefficients of one
band. The places of the numbers are random, and the same for all weights of a size. C is (out, in), with a margin of
zeros as wide as the wavelet's filter wants. As in HF PEFT its upper right quarter is the band that changes from row to
row, the lower left one that from column to column. With use_idwt=False the change is s C itself.
"""

import math
import re
from functools import cache
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapter import Adapter
from .delta import shape_of
from .spectrum import SpectrumAdapter, SpectrumConfig

MOST = 10  # vanishing moments of the longest wavelet that HF PEFT has


class WaveFTAdapter(SpectrumAdapter):
    hf_names: ClassVar[dict[str, str]] = {"spectrum": "waveft_spectrum"}

    def __init__(self, site: nn.Module, n: int, config: "WaveFTConfig") -> None:
        super().__init__(site, n, config.random_loc_seed, config.scaling, 0.0 if config.init_weights else 0.01)
        self.filters = filters(int(config.wavelet_family.removeprefix("db"))) if config.use_idwt else []

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        sizes = shape[0], math.prod(shape[1:])
        C = self.sparse(*sizes)
        if self.filters:
            margins = [size % 2 + len(self.filters[0]) - 2 for size in sizes]
            C = F.pad(C, [side for margin in reversed(margins) for side in (margin // 2, margin - margin // 2)])
            (low, across), (along, high) = (half.chunk(2, 1) for half in C.chunk(2, 0))
            C = torch.cat([torch.cat([low, along], 1), torch.cat([across, high], 1)])
            taps = torch.tensor(self.filters, dtype=C.dtype, device=C.device)
            C = _inverse(_inverse(C, taps).T, taps).T[: sizes[0], : sizes[1]]
        return (C * self.scale).reshape(shape)


def _inverse(C: Tensor, taps: Tensor) -> Tensor:
    """One level of the inverse transform of each row (..., P), its first half the low band; (..., P - length + 2)."""
    length = taps.shape[1]
    bands = torch.stack(C.chunk(2, 1), 1)
    return F.conv_transpose1d(bands, taps[:, None], stride=2)[:, 0, length - 2 : C.shape[1]]


@cache
def filters(moments: int) -> list[list[float]]:
    """Daubechies' low and high filter of 2 * moments taps, with which a signal is put together.

    The low one is (1 + z)^moments times the factor of shortest delay of a polynomial that makes the two orthogonal
    (Daubechies 1988, section 4); its taps add up to the root of 2.
    """
    half = [math.comb(moments - 1 + k, k) for k in range(moments)]
    found = [-1.0] * moments
    for y in np.roots(half[::-1]):
        found.append(min(np.roots([1, 4 * y - 2, 1]), key=abs))  # y = (2 - z - 1 / z) / 4
    taps = np.poly(found).real
    low = (taps * math.sqrt(2) / taps.sum()).tolist()
    return [low, [(-1) ** place * tap for place, tap in enumerate(reversed(low))]]


class WaveFTConfig(SpectrumConfig):
    """WaveFT's settings; those of SpectrumConfig, and:

    wavelet_family: Daubechies' wavelets "db1" (Haar's) to "db10"; HF PEFT's "sym" and "coif" are not offered.
    use_idwt: transform C. proportional_parameters: share the numbers of all sites out by the size of their weights.
    bias: which biases are trained as well, "none", "all" or those of the targets ("waveft_only"). init_weights=False
    starts at random.
    """

    peft_type: ClassVar[str] = "WAVEFT"
    trains: ClassVar[str] = "a few of the change's wavelets"
    relative_rate: ClassVar[float] = 0.5
    when: ClassVar[str] = "Image generation with a few pictures of a subject; a number of parameters of one's choice."
    evidence: ClassVar[str] = (
        "Bilican et al. report that with few parameters it keeps the subject and the prompt better than LoRA when "
        "Stable Diffusion XL is personalised. A matrix as large as the weight is transformed in every step."
    )
    hf_prefix: ClassVar[str] = "waveft_"

    n_frequency: int = Field(default=2592, ge=1)
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    bias: Literal["none", "all", "waveft_only"] = "none"
    proportional_parameters: bool = False
    init_weights: bool = True

    @field_validator("wavelet_family")
    @classmethod
    def _known(cls, value: str) -> str:
        names = [f"db{moments}" for moments in range(1, MOST + 1)]
        if value not in names:
            raise ValueError(f"no such wavelet here. There is: {', '.join(names)}")
        return value

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        if not self.proportional_parameters:
            return super().adapters(model)
        sizes = {name: math.prod(shape_of(site)) for name, site in self.find(model).items()}
        each = self.n_frequency * len(sizes) / sum(sizes.values())
        shares = {f"^{re.escape(name)}": max(1, round(size * each)) for name, size in sizes.items()}
        update = {"proportional_parameters": False, "n_frequency_pattern": shares}
        return self.model_copy(update=update).adapters(model)

    def build(self, name: str, site: nn.Module) -> WaveFTAdapter:
        return self.biased(WaveFTAdapter(site, self.frequencies(name, site), self), site)
