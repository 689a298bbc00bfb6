"""What methods have in common that may train biases beside their own weights: bias="none", "all" or "..._only"."""

from typing import TypeVar

from torch import Tensor, nn

from ..adapter import Adapter
from ..targets import TargetConfig
from .bitfit import TrainedBias, add_biases, own_bias


class BiasedAdapter(Adapter):
    bias: TrainedBias | None

    def __init__(self) -> None:
        super().__init__()
        self.bias = None

    def with_bias(self, site: nn.Module, y: Tensor) -> Tensor:
        """y, with the trained bias in place of the site's own."""
        return y if self.bias is None else self.bias.add(site, y)

    def merged_bias(self, site: nn.Module, bias: Tensor | None) -> Tensor | None:
        return bias if self.bias is None else self.bias.fold(site, bias)

    def hf_key(self, name: str) -> str:
        return "base_layer.bias" if name == "bias.value" else super().hf_key(name)


BiasedAdapterT = TypeVar("BiasedAdapterT", bound=BiasedAdapter)


class BiasedConfig(TargetConfig):
    """bias: which biases are trained as well: "none", "all", or another word for those of the targets."""

    bias: str = "none"

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        return add_biases(made, model) if self.bias == "all" else made

    def biased(self, adapter: BiasedAdapterT, site: nn.Module) -> BiasedAdapterT:
        """The adapter, with a trained bias if the site has one and the setting says so."""
        if self.bias != "none" and own_bias(site) is not None:
            adapter.bias = TrainedBias(site)
        return adapter
