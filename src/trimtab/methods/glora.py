"""GLoRA (Chavan et al. 2023, arXiv 2306.07967): y = (W + W * A + B) x + b + b * D + E + W C, * elementwise.

A and B are (out, in), C is (in, 1), D and E are (out,), each given by fewer numbers: as a product of rank r ("lora"),
one number for each row ("vector"), one for all ("constant"), or left out ("none"). C, D and E are for layers with a
bias. All start at zero. The paper searches the best form for each layer; here, as in HF PEFT, one serves all.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from .. import weights
from ..errors import ConfigError
from ..targets import is_linear
from .biased import BiasedAdapter, BiasedConfig
from .bitfit import own_bias
from .delta import shape_of


class Form(nn.Module):
    """One of the five: Xd (rows, r) times Xu (r, columns), or X."""

    def __init__(self, site: nn.Module, kind: str, shape: tuple[int, ...], r: int, init: bool) -> None:
        super().__init__()
        if kind == "lora":
            self.Xd, self.Xu = weights.new_parameter(site, shape[0], r), weights.new_parameter(site, r, shape[1])
            nn.init.kaiming_uniform_(self.Xu, a=math.sqrt(5))
        else:
            sizes = (1,) if kind == "constant" else (shape[0], *[1] * (len(shape) - 1))
            self.X = weights.new_parameter(site, *sizes)
        zero = self.Xd if kind == "lora" else self.X
        if init:
            nn.init.zeros_(zero)
        else:  # no identity: for tests, and for those who load weights anyway
            nn.init.normal_(zero, std=0.02)

    def forward(self) -> Tensor:
        return self.Xd @ self.Xu if "Xd" in self._parameters else self.X


class GloraAdapter(BiasedAdapter):
    def __init__(self, site: nn.Module, config: "GloraConfig") -> None:
        super().__init__()
        out, into = shape_of(site)
        of_weight, biased = config.config_A_B, own_bias(site) is not None
        of_bias = config.config_D_E if biased else "none"
        forms = {
            "A": (of_weight, (out, into)), "B": (of_weight, (out, into)),
            "C": (config.config_C if biased else "none", (into, 1)), "D": (of_bias, (out,)), "E": (of_bias, (out,)),
        }  # fmt: skip
        self.forms = nn.ModuleDict({
            name: Form(site, kind, shape, config.r, config.init_weights)
            for name, (kind, shape) in forms.items() if kind != "none"
        })  # fmt: skip
        self._zeros = {f"glora_{name}.zeros": shape for name, (kind, shape) in forms.items() if kind == "none"}
        self.hf_computed = tuple(self._zeros)
        if of_weight == "lora":
            self.rank = config.r, min(out, into)

    def _weight(self, site: nn.Module) -> Tensor | None:
        """W * A + B, in the type of W."""
        if "A" not in self.forms:
            return None
        W = weights.read(site)
        return torch.addcmul(self.forms["B"]().to(W.dtype).expand_as(W), W, self.forms["A"]().to(W.dtype))

    def _bias(self, site: nn.Module) -> Tensor | None:
        """b * D + E + W C, with b the trained bias if there is one."""
        found = []
        if "D" in self.forms:
            b = self.bias.value if self.bias is not None else own_bias(site)
            assert b is not None
            found.append(b * self.forms["D"]() + self.forms["E"]())
        if "C" in self.forms:
            C = self.forms["C"]()
            found.append((weights.read(site).to(C.dtype) @ C).flatten())
        return sum(found) if found else None

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        weight, bias = self._weight(site), self._bias(site)
        if weight is not None:
            y = y + F.linear(x, weight.to(x.dtype)).to(y.dtype)
        return self.with_bias(site, y if bias is None else y + bias.to(y.dtype))

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        change = self._weight(site)
        return weight if change is None else weight + change.to(weight.dtype)

    def merged_bias(self, site: nn.Module, bias: Tensor | None) -> Tensor | None:
        change = self._bias(site)
        if bias is not None and change is not None:
            bias = bias + change.to(bias.dtype)
        return super().merged_bias(site, bias)

    def hf_key(self, name: str) -> str:
        return super().hf_key(name).replace("forms.", "glora_")

    def computed(self) -> dict[str, Tensor]:
        return {end: torch.zeros(shape) for end, shape in self._zeros.items()}


class GloraConfig(BiasedConfig):
    """GLoRA's settings.

    r: rank of what is "lora". config_A_B: "lora", "vector", "constant" or "none". config_C: "lora", "vector" or "none".
    config_D_E: "vector", "constant" or "none". bias: which biases are trained as well, "none", "all" or those of the
    targets ("glora_only"). init_weights=False starts at random.
    """

    peft_type: ClassVar[str] = "GLORA"
    trains: ClassVar[str] = "factors and shifts of weights and biases"
    when: ClassVar[str] = "Vision models, and layers whose weight and bias should both be scaled and shifted."
    evidence: ClassVar[str] = (
        "Chavan et al. report better accuracy than earlier methods on VTAB-1K, few-shot image tasks and domain "
        "generalisation, and gains on LLaMA, with a search for the best form of each layer, which is not done here. A "
        "matrix as large as the weight is built in every step unless config_A_B is none."
    )
    hf_prefix: ClassVar[str] = "glora_"
    not_in_hf: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    r: int = Field(default=8, ge=1)
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"  # noqa: N815 - HF PEFT's name
    config_C: Literal["lora", "vector", "none"] = "lora"  # noqa: N815
    config_D_E: Literal["vector", "constant", "none"] = "constant"  # noqa: N815
    bias: Literal["none", "all", "glora_only"] = "none"
    init_weights: bool = True

    def fits(self, module: nn.Module) -> bool:
        return is_linear(module)

    def build(self, name: str, site: nn.Module) -> GloraAdapter:
        adapter = GloraAdapter(site, self)
        if not adapter.forms:
            beside = "" if own_bias(site) is not None else " where there is no bias"
            raise ConfigError(f"{name}: config_A_B='none' leaves nothing to train{beside}. Closest: 'constant'.")
        return self.biased(adapter, site)
