"""y = f(x) + D x: what methods have in common that train n numbers at random places of a matrix, from which D follows.

Which places, follows from a seed and the size of the matrix, as in HF PEFT: sites of one size have the same ones.
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import weights
from ..adapter import Adapter
from ..errors import ConfigError
from ..targets import FanConfig, check_patterns, pattern_value
from .biased import BiasedConfig
from .delta import DeltaAdapter, shape_of


class Places(nn.Module):
    """index (n,) of a matrix's entries, row by row; one object that all sites of its size hold."""

    index: Tensor

    def __init__(self, size: int, n: int, seed: int) -> None:
        super().__init__()
        # On the CPU whatever the device, so that a seed means the same places everywhere; HF PEFT draws the same.
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randperm(size, generator=generator, device="cpu")[:n].clone()
        self.register_buffer("index", drawn, persistent=False)


class SpectrumAdapter(DeltaAdapter):
    """spectrum holds the n numbers."""

    places: Places  # SpectrumConfig.adapters puts it in

    def __init__(self, site: nn.Module, n: int, seed: int, scale: float, std: float) -> None:
        """std: of the numbers at the start."""
        super().__init__()
        self.seed, self.scale = seed, scale
        self.spectrum = weights.new_parameter(site, n)
        if std:
            nn.init.normal_(self.spectrum, std=std)
        else:
            nn.init.zeros_(self.spectrum)

    def sparse(self, rows: int, columns: int) -> Tensor:
        """The matrix (rows, columns) of the n numbers and zeros."""
        return scattered(self.spectrum, self.places.index, rows, columns)

    def neutral(self, site: nn.Module) -> dict[str, Tensor]:
        return {"spectrum": torch.zeros_like(self.spectrum)} if self.bias is None else {}


class SpectrumConfig(BiasedConfig, FanConfig):
    """Settings that FourierFT and WaveFT share.

    n_frequency: how many numbers are trained at each site. scaling: by which D is multiplied. random_loc_seed: the seed
    of their places. n_frequency_pattern: other numbers for the modules a key (a regular expression for the end of the
    name) means.
    """

    n_frequency: int = Field(ge=1)
    scaling: float
    random_loc_seed: int = 777
    n_frequency_pattern: dict[str, int] = {}

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        own = {name: adapter for name, adapter in made.items() if isinstance(adapter, SpectrumAdapter)}
        check_patterns("n_frequency_pattern", self.n_frequency_pattern, own)
        known: dict[tuple[int, ...], Places] = {}
        for name, adapter in own.items():
            site = model.get_submodule(name)
            size, n = math.prod(shape_of(site)), len(adapter.spectrum)
            if (size, n) not in known:
                known[size, n] = weights.beside(site, Places(size, n, self.random_loc_seed))
            adapter.places = known[size, n]
        return made

    def frequencies(self, name: str, site: nn.Module) -> int:
        n, most = pattern_value(self.n_frequency_pattern, name, self.n_frequency), math.prod(shape_of(site))
        if not 0 < n <= most:
            raise ConfigError(f"{name} has {most} places: n_frequency={n} do not fit. Closest: {max(1, min(n, most))}, "
                              f"or for this alone n_frequency_pattern={{{name!r}: ...}}.")  # fmt: skip
        return n


def scattered(values: Tensor, index: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix of values (n,) at places (n,), counted row by row, and of zeros; never below float32."""
    values = values.to(weights.master_dtype(values.dtype))
    return values.new_zeros(rows * columns).scatter(0, index.to(values.device), values).view(rows, columns)
