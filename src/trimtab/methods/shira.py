"""SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175): y = W x + b + S x, S (out, in) zero but for r (in + out) numbers.

They are as many as LoRA of rank r has, at random places that are saved with them, and start at zero. So a small part of
the weight is trained directly, and the rank of the change is not bounded by r.
"""

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import weights
from ..errors import ConfigError
from ..targets import FanConfig
from .delta import DeltaAdapter, shape_of
from .spectrum import scattered


class ShiraAdapter(DeltaAdapter):
    hf_names: ClassVar[dict[str, str]] = {"values": "shira_weight", "places": "shira_indices"}

    places: Tensor

    def __init__(self, site: nn.Module, n: int, seed: int | None, init: bool) -> None:
        """values (n,), and places (2, n), their rows and columns."""
        super().__init__()
        self.values = weights.new_parameter(site, n)
        if init:
            nn.init.zeros_(self.values)
        else:  # no identity: for tests, and for those who load weights anyway
            nn.init.normal_(self.values)
        out, *into = shape_of(site)
        self.register_buffer("places", torch.empty(2, n, dtype=torch.int32, device=self.values.device))
        if not self.values.is_meta:
            generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
            drawn = torch.randperm(out * math.prod(into), generator=generator, device="cpu")[:n].sort().values
            self.places.copy_(torch.stack([drawn // math.prod(into), drawn % math.prod(into)]))

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        rows, columns = self.places.long()
        size = shape[0], math.prod(shape[1:])
        return scattered(self.values, rows * size[1] + columns, *size).view(shape)


class ShiraConfig(FanConfig):
    """SHiRA's settings.

    r: for r (in + out) numbers at each site. random_seed: of their places, which are then the same at sites of one
    size; None draws on torch's own random numbers. mask_type: "random"; others are read from files, which hold the
    places. init_weights=False starts at random.
    """

    peft_type: ClassVar[str] = "SHIRA"
    trains: ClassVar[str] = "a few of the weight's own entries"
    relative_rate: ClassVar[float] = 2.0
    when: ClassVar[str] = (
        "Many adapters of one base that are exchanged quickly, or act together with little interference."
    )
    evidence: ClassVar[str] = (
        "Bhardwaj et al. report better results than LoRA on image generation and language models with 1 to 2 % of the "
        "weights trained, fast exchange, and less loss of what each adapter knows where several act at once. A matrix "
        "as large as the weight is built in every step."
    )
    hf_prefix: ClassVar[str] = "shira_"
    not_in_hf: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    r: int = Field(default=32, ge=1)
    mask_type: str = "random"
    random_seed: int | None = None
    init_weights: bool = True

    def build(self, name: str, site: nn.Module) -> ShiraAdapter:
        out, *into = shape_of(site)
        sides, size = out + math.prod(into), out * math.prod(into)
        if self.r * sides > size:
            way = f"Closest: {size // sides}" if size >= sides else "Leave it out with exclude_modules"
            raise ConfigError(f"{name} has {size} entries, fewer than r={self.r} means: {self.r} * {sides}. {way}.")
        adapter = ShiraAdapter(site, self.r * sides, self.random_seed, self.init_weights)
        if self.mask_type != "random" and not adapter.values.is_meta:
            raise ConfigError(f"mask_type={self.mask_type!r}: new adapters have random places. Closest: 'random'.")
        return adapter
