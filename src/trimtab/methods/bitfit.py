"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): train biases only. y = f(x) + (b' - b), b' trained from b."""

from torch import Tensor, nn

from .. import weights
from ..adapter import Adapter

CHANNELS_FIRST = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


class TrainedBias(nn.Module):
    """A trained value b' (out,) beside the site's own bias b, which stays as it is."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        bias = own_bias(site)
        assert bias is not None
        self.value = nn.Parameter(bias.detach().to(weights.master_dtype(bias.dtype), copy=True))

    def add(self, site: nn.Module, y: Tensor) -> Tensor:
        """y (..., out) or, after convolutions and norms of channels, (B, out, ...)."""
        bias = own_bias(site)
        assert bias is not None
        shift = (self.value - bias).to(y.dtype)
        return y + shift.view(-1, *[1] * _behind_channels(site, y))

    def fold(self, site: nn.Module, bias: Tensor | None) -> Tensor:
        own = own_bias(site)
        assert own is not None and bias is not None
        return bias + (self.value - own).to(bias.dtype)


class BiasAdapter(Adapter):
    """The trained bias of a module that has nothing else to adapt."""

    hf_wraps = False

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.bias = TrainedBias(site)
        self.name = bias_name(site)

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.bias.add(site, y)

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        return weight

    def merged_bias(self, site: nn.Module, bias: Tensor | None) -> Tensor | None:
        return self.bias.fold(site, bias)

    def hf_key(self, name: str) -> str:
        return self.name


def _behind_channels(site: nn.Module, y: Tensor) -> int:
    """The number of dimensions of y that follow its channels."""
    if isinstance(site, nn.modules.conv._ConvNd):
        return len(site.kernel_size)  # y may lack the batch
    if isinstance(site, nn.modules.instancenorm._InstanceNorm):
        return int(site._get_no_batch_dim()) - 1  # type: ignore[no-untyped-call]  # the same
    return y.dim() - 2 if isinstance(site, CHANNELS_FIRST) else 0


def bias_name(site: nn.Module) -> str:
    shape = weights.layout(site)
    return shape.bias if shape else "bias"


def has_bias(module: nn.Module) -> bool:
    """Whether it has a bias of that name: nn.MultiheadAttention's in_proj_bias is none to HF PEFT and its files."""
    return own_bias(module) is not None and bias_name(module) == "bias"


def own_bias(site: nn.Module) -> Tensor | None:
    """The stored bias of a module, whatever adapters say of it."""
    return site._parameters.get(bias_name(site))
