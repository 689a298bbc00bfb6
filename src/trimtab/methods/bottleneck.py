"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751): y' = y + s U act(D y).

D (r, n) and U (n, r) have a bias each, and r = n / reduction_factor. Papers differ in where they put it:

    houlsby   after attention and after the feed-forward part         Houlsby et al. 2019, arXiv 1902.00751
    pfeiffer  after the feed-forward part only                        Pfeiffer et al. 2020, arXiv 2005.00247
    parallel  beside the feed-forward part: y' = y + s U act(D x)     He et al. 2021, arXiv 2110.04366 (s = 4)
    and without any in the first layers                               AdapterDrop, Rücklé et al. 2020, arXiv 2010.11918

y is what a part's last linear layer gives, before the model's own skip connection, and x what its first one gets.
Pfeiffer's AdapterFusion applies the model's layer norm once more; here a norm of the adapter's own can be had. U starts
at zero, so that nothing changes at first; Houlsby's start is near that.
"""

import re
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from .. import weights
from ..adapter import Adapter
from ..errors import ConfigError, TargetError
from ..targets import TargetConfig, adaptable, base_modules, compact, is_linear, shared

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "leaky_relu": F.leaky_relu
}  # fmt: skip


class PartInput(Adapter):
    """At the first layer of a feed-forward part: keeps its input for the adapter at the last one."""

    not_merged: ClassVar[str] = "a non-linearity lies between its two matrices"

    def __init__(self) -> None:
        super().__init__()
        self.x: Tensor | None = None

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        self.x = x
        return y

    def take(self) -> Tensor:
        x, self.x = self.x, None  # not kept beyond the call
        assert x is not None, "the part's last layer was called without its first"
        return x

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "x": None}


class BottleneckAdapter(Adapter):
    hf_names: ClassVar[dict[str, str]] = {
        name: f"bottleneck_{name}" for name in ("down", "down_bias", "up", "up_bias", "norm.weight", "norm.bias")
    }
    not_merged: ClassVar[str] = "a non-linearity lies between its two matrices"

    def __init__(self, site: nn.Module, into: int, out: int, config: "BottleneckConfig") -> None:
        super().__init__()
        r = max(1, int(into / config.reduction_factor))
        self.down = weights.new_parameter(site, r, into)
        self.down_bias = weights.new_parameter(site, r)
        self.up = weights.new_parameter(site, out, r)
        self.up_bias = weights.new_parameter(site, out)
        self.norm = None
        if config.layer_norm != "none":
            features = into if config.layer_norm == "before" else out
            self.norm = nn.LayerNorm(features, device=self.up.device, dtype=self.up.dtype)
        self.activation, self.norm_first = config.non_linearity, config.layer_norm == "before"
        self.parallel, self.residual = config.variant == "parallel", config.residual
        assert config.scaling is not None, "resolve the config first"
        self.scaling, self.dropout = config.scaling, config.dropout
        self.part: PartInput | None = None
        nn.init.trunc_normal_(self.down, std=0.01, a=-0.02, b=0.02)
        for bias in (self.down_bias, self.up_bias, *([] if config.near_identity else [self.up])):
            nn.init.zeros_(bias)
        if config.near_identity:
            nn.init.trunc_normal_(self.up, std=0.01, a=-0.02, b=0.02)

    def after(self, site: nn.Module, x: Any, y: Any) -> Any:
        if isinstance(y, tuple):  # attention gives its weights beside the output
            return (self.after(site, x, y[0]), *y[1:])
        if self.part is not None:
            x = self.part.take()
        h = F.dropout(x if self.parallel else y, self.dropout, self.training)
        delta = self._bottleneck(h) * self.scaling
        return y + delta.to(y.dtype) if self.residual else delta.to(y.dtype)

    def _bottleneck(self, h: Tensor) -> Tensor:
        """U act(D h), h (..., in) -> (..., out)."""
        h = self._normed(h) if self.norm_first else h
        h = squeeze(h, self.down, self.down_bias, self.up, self.up_bias, self.activation)
        return h if self.norm_first else self._normed(h)

    def _normed(self, h: Tensor) -> Tensor:
        if self.norm is None:
            return h
        return F.layer_norm(h, h.shape[-1:], self.norm.weight.to(h.dtype), self.norm.bias.to(h.dtype), self.norm.eps)


class BottleneckConfig(TargetConfig):
    """Bottleneck adapters' settings.

    variant: "houlsby", "pfeiffer" or "parallel". reduction_factor: r = n / reduction_factor. non_linearity: act.
    scaling: s; None means 1, and 4 for parallel. dropout: probability, on the adapter's input. layer_norm: a norm of
    the adapter's own, "before" D or "after" U. residual: y' = y + ...; False gives the bottleneck's result alone.
    near_identity: U starts small as D does, not at zero. drop_first: the first n layers (of each stack) go without.
    share_across_layers: one adapter for all layers, saved once.
    target_modules: modules to put an adapter after (or beside) instead of where the variant does, of any class whose
    output has one width, tuples included.
    """

    peft_type: ClassVar[str] = "BOTTLENECK"
    trains: ClassVar[str] = "small layers of its own"
    when: ClassVar[str] = "Composing and exchanging skills as modules; more room for learning than low ranks have."
    evidence: ClassVar[str] = (
        "The oldest of these methods: Houlsby's paper comes within 0.4 % of full fine-tuning on GLUE with 3.6 % of "
        "the parameters per task, and He et al. (2022) find the parallel variant at the feed-forward part the best "
        "use of a larger budget. It cannot be merged, so its layers stay in the way at inference; drop_first takes "
        "some of that back."
    )
    hf_prefix: ClassVar[str] = "bottleneck_"

    variant: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    reduction_factor: float = Field(default=16, ge=1)
    non_linearity: Literal["relu", "gelu", "silu", "tanh", "leaky_relu"] = "relu"
    scaling: float | None = Field(default=None, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    layer_norm: Literal["none", "before", "after"] = "none"
    residual: bool = True
    near_identity: bool = False
    drop_first: int = Field(default=0, ge=0)
    share_across_layers: bool = False

    @model_validator(mode="after")
    def _parallel_adds(self) -> Self:
        if self.variant == "parallel" and not self.residual:
            raise ValueError("residual=False would put the adapter in the place of the part it is parallel to. "
                             "Set residual=True, or another variant")  # fmt: skip
        return self

    def default_targets(self, model: nn.Module) -> list[str]:
        return ends_of_parts(model, attention=self.variant == "houlsby")

    def resolved(self, model: nn.Module) -> "BottleneckConfig":
        config = super().resolved(model)
        if config.scaling is None:
            config = config.model_copy(update={"scaling": 4.0 if self.variant == "parallel" else 1.0})
        return config

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        found = super().find(model)
        left = {name: site for name, site in found.items() if layer_number(name, self.drop_first) >= self.drop_first}
        if not left:
            most = max(layer_number(name, 0) for name in found)
            raise ConfigError(f"drop_first={self.drop_first} leaves no layer. Closest: {most}.")
        return left

    def fits(self, module: nn.Module) -> bool:
        return not isinstance(module, weights.CONVOLUTIONS) and width(module) is not None

    def build(self, name: str, site: nn.Module) -> BottleneckAdapter:
        out = width(site)
        assert out is not None
        shape = weights.layout(site)
        return self._sized(name, site, shape.into if shape and self.variant == "parallel" else out, out)

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        if self.variant == "parallel":
            modules = dict(base_modules(model))
            for first, last in [ends for part, ends in parts(model).items() if not is_attention(part)]:
                adapter = made.get(last)
                if not isinstance(adapter, BottleneckAdapter) or first == last:
                    continue
                if first in made:
                    raise TargetError(f"{first} and {last} are the ends of one feed-forward part: target only {last}.")
                shape = weights.layout(modules[first])
                assert shape is not None
                beside = self._sized(last, modules[last], shape.into, len(adapter.up))
                made[first] = beside.part = PartInput()
                made[last] = beside
        return shared(made) if self.share_across_layers else made

    def _sized(self, name: str, site: nn.Module, into: int, out: int) -> BottleneckAdapter:
        if self.reduction_factor > into:
            raise ConfigError(f"{name} is {into} wide: reduction_factor={self.reduction_factor:g} leaves nothing. "
                              f"Closest: {into}.")  # fmt: skip
        return BottleneckAdapter(site, into, out, self)


def squeeze(h: Tensor, D: Tensor, d: Tensor, U: Tensor, u: Tensor, activation: str) -> Tensor:
    """U act(D h + d) + u, h (..., in) -> (..., out), in the type of h."""
    inner = ACTIVATIONS[activation](F.linear(h, D.to(h.dtype), d.to(h.dtype)))
    return F.linear(inner, U.to(h.dtype), u.to(h.dtype))


def ends_of_parts(model: nn.Module, attention: bool) -> list[str]:
    """The last linear layer of every feed-forward part, and of attention too if that is wanted, as target_modules."""
    ends = [end for part, (_, end) in parts(model).items() if attention or not is_attention(part)]
    if not ends:
        raise TargetError(f"{type(model).__name__} has no numbered layers with a feed-forward part that ends in a "
                          "linear layer as wide as it begins. Give target_modules.")  # fmt: skip
    return compact([name for name in adaptable(model) if name in ends], model)


def parts(model: nn.Module) -> dict[str, tuple[str, str]]:
    """The first and the last linear layer of every attention and every feed-forward part, by the part's name.

    A layer is what has the first number in its name. What lies in something called att... is attention; the rest is
    the feed-forward part, if its last linear layer gives as many features as its first one takes.
    """
    modules = dict(base_modules(model))
    groups: dict[str, list[str]] = {}
    for name in adaptable(model):
        if is_linear(modules[name]) and (part := re.match(r"(?:.*?\.)??\d+\.(?:.*?att[^.]*(?=\.))?", name, re.I)):
            groups.setdefault(part[0], []).append(name)
    shapes = adaptable(model)
    ends = {part: (names[0], names[-1]) for part, names in groups.items()}
    return {
        part: (first, last)
        for part, (first, last) in ends.items()
        if is_attention(part) or (first != last and shapes[first].into == shapes[last].out)
    }


def is_attention(part: str) -> bool:
    return not part.endswith(".")


def layer_number(name: str, default: int) -> int:
    """The first number in a module's name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), default)


def width(module: nn.Module) -> int | None:
    """How many features the module gives: its own, or those of the last layer in it."""
    inner = [found for part in module.modules() if (found := weights.layout(part)) is not None and not found.kernel]
    if inner:
        return inner[-1].out if weights.layout(module) is None else inner[0].out
    weight = module._parameters.get("weight")  # a norm's
    return len(weight) if weight is not None and weight.dim() == 1 else None
