"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): train biases only. y = f(x) + (b' - b), b' trained from b."""

from typing import ClassVar, TypeVar

from torch import Tensor, nn

from .. import weights
from ..adapter import Adapter
from ..errors import TargetError
from ..targets import TargetConfig, base_modules, compact

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

    def neutral(self, site: nn.Module) -> dict[str, Tensor]:
        bias = own_bias(site)
        assert bias is not None
        return {"bias.value": bias}

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


def add_biases(made: dict[str, Adapter], model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a method with bias="all": its own, and the trained biases of all other modules."""
    copied = tuple(f"{name}." for name, adapter in made.items() if adapter.replacement is not None)
    biased = {name: module for name, module in base_modules(model) if has_bias(module) and not name.startswith(copied)}
    return made | {name: BiasAdapter(module) for name, module in biased.items() if name not in made}


class BiasedAdapter(Adapter):
    """An adapter of weights beside which the site's bias may be trained as well."""

    bias: TrainedBias | None

    def __init__(self) -> None:
        super().__init__()
        self.bias = None

    def shifted(self, site: nn.Module, y: Tensor) -> Tensor:
        return y if self.bias is None else self.bias.add(site, y)

    def merged_bias(self, site: nn.Module, bias: Tensor | None) -> Tensor | None:
        return bias if self.bias is None else self.bias.fold(site, bias)


BiasedAdapterT = TypeVar("BiasedAdapterT", bound=BiasedAdapter)


class BiasedConfig(TargetConfig):
    """bias: which biases are trained as well: "none", "all", or another word for those of the targets."""

    bias: str = "none"

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        return add_biases(made, model) if self.bias == "all" else made

    def with_bias(self, adapter: BiasedAdapterT, site: nn.Module) -> BiasedAdapterT:
        if self.bias != "none" and own_bias(site) is not None:
            adapter.bias = TrainedBias(site)
        return adapter


class BitFitConfig(TargetConfig):
    """BitFit's settings: whose biases. None means every module that has one, "attention" those inside attention."""

    peft_type: ClassVar[str] = "BITFIT"
    trains: ClassVar[str] = "biases"
    relative_rate: ClassVar[float] = 2.0
    when: ClassVar[str] = (
        "Little data, a tiny file, and a model with biases, such as BERT. LLaMA and its like have none."
    )
    evidence: ClassVar[str] = (
        "Ben Zaken et al. find it competitive with full fine-tuning of BERT on small and medium data with about 0.1 % "
        "of the parameters, at times better; with more data full fine-tuning is ahead. Nothing is added to the model, "
        "merged or not, but biases can change little by themselves."
    )

    def default_targets(self, model: nn.Module) -> list[str]:
        return _biased(model)

    def resolved(self, model: nn.Module) -> "BitFitConfig":
        if self.target_modules != "attention":
            return super().resolved(model)
        return self.model_copy(update={"target_modules": _biased(model, "attention", "attn")}).resolved(model)

    def fits(self, module: nn.Module) -> bool:
        return is_biased(module)

    def build(self, name: str, site: nn.Module) -> BiasAdapter:
        return BiasAdapter(site)


def is_biased(module: nn.Module) -> bool:
    """Whether the module adds a bias to what it returns: what other modules do with theirs is not known."""
    known = weights.layout(module) is not None or "norm" in type(module).__name__.lower()
    return known and own_bias(module) is not None


def _biased(model: nn.Module, *parents: str) -> list[str]:
    """The modules with a bias, of all or of those below a module with one of these words in its name."""
    names = [name for name, module in base_modules(model) if is_biased(module)]
    if parents:
        names = [name for name in names if any(word in name.rpartition(".")[0].lower() for word in parents)]
    if not names:
        where = " in attention" if parents else ""
        raise TargetError(f"BitFit trains biases, of which {type(model).__name__} has none{where}.")
    return compact(names, model)
