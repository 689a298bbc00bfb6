"""BEFT (Huang et al. 2025, arXiv 2509.15974): y = f(x) + v, v (out,) trained from zero; at attention's values only.

Unlike BitFit it needs no bias in the model to begin with; only to be merged it does.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import weights
from ..adapter import Adapter
from ..errors import MergeError
from ..targets import TargetConfig, is_linear
from .bitfit import own_bias
from .delta import shape_of


class BeftAdapter(Adapter):
    hf_names: ClassVar[dict[str, str]] = {"shift": "beft_bias"}

    def __init__(self, site: nn.Module, init: bool) -> None:
        """shift holds v in HF PEFT's shape, (1, out)."""
        super().__init__()
        self.shift = weights.new_parameter(site, 1, shape_of(site)[0])
        if init:
            nn.init.zeros_(self.shift)
        else:  # no identity: for tests, and for those who load weights anyway
            nn.init.normal_(self.shift)

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return y + self.shift[0].to(y.dtype)

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        if own_bias(site) is None:  # a model saved with one more would be read without it
            raise MergeError(f"A {type(site).__name__} without a bias has nothing to fold BEFT's into. "
                             "Keep the adapter attached instead.")  # fmt: skip
        return weight

    def merged_bias(self, site: nn.Module, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias + self.shift[0].to(bias.dtype)

    def neutral(self, site: nn.Module) -> dict[str, Tensor]:
        return {"shift": torch.zeros_like(self.shift)}


class BeftConfig(TargetConfig):
    """BEFT's settings: target_modules=None takes attention's value projection, or the one that it is fused with.

    init_weights=False starts at random.
    """

    peft_type: ClassVar[str] = "BEFT"
    trains: ClassVar[str] = "biases of attention's values"
    relative_rate: ClassVar[float] = 8.0
    when: ClassVar[str] = "Very little data, and the smallest file there is; models without biases, such as LLaMA."
    evidence: ClassVar[str] = (
        "Huang et al. find that of the biases of queries, keys and values those of values do best with little data, on "
        "encoders and decoders of up to 6.7 billion parameters. A constant shift is all that it learns, and where "
        "the layer has no bias it cannot be merged."
    )
    hf_prefix: ClassVar[str] = "beft_"
    not_in_hf: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    init_weights: bool = True

    def default_targets(self, model: nn.Module) -> list[str]:
        return super().default_targets(model)[-1:]

    def fits(self, module: nn.Module) -> bool:
        return is_linear(module)

    def build(self, name: str, site: nn.Module) -> BeftAdapter:
        return BeftAdapter(site, self.init_weights)
