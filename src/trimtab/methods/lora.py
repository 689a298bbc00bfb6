"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = W x + s B A x.

A (r, in) starts random and B (out, r) at zero, so that nothing changes at first; s = alpha / r, or alpha / sqrt(r)
with rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732). Dropout acts on x before A. On a convolution A
is a convolution with the site's kernel, stride and padding to r channels and B one with kernel 1; an embedding of
V rows is the linear map of one-hot vectors, so A is (r, V).

Where an nn.MultiheadAttention is a target, its output projection is one too, and there s is doubled: HF PEFT adds that
product twice, and an adapter must mean the same in both libraries.
"""

import math
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from .. import weights
from ..adapter import Adapter
from ..errors import ConfigError, MergeError
from ..targets import TargetConfig, base_modules, check_patterns, pattern_name, pattern_value
from .bitfit import BiasAdapter, TrainedBias, has_bias


class LoraAdapter(Adapter):
    def __init__(self, site: nn.Module, r: int, scale: float, dropout: float, init: bool | str) -> None:
        """A (r, in, *kernel) and B (out, r / groups); scale is s, dropout a probability."""
        super().__init__()
        shape = weights.layout(site)
        assert shape is not None
        self.scale, self.dropout = scale, dropout
        self.embeds = isinstance(site, nn.Embedding)
        self.A = weights.new_parameter(site, r, shape.into, *shape.kernel)
        self.B = weights.new_parameter(site, shape.out, r // shape.groups)
        self.bias: TrainedBias | None = None
        self._initialise(init)

    def _initialise(self, init: bool | str) -> None:
        # On an embedding B is the random one: A's columns are rows of the vocabulary, of which a step sees few.
        zero, random = (self.A, self.B) if self.embeds else (self.B, self.A)
        if init == "gaussian":
            nn.init.normal_(random, std=1 / len(self.A))
        elif self.embeds:
            nn.init.normal_(random)
        else:
            nn.init.kaiming_uniform_(random, a=math.sqrt(5))
        if init is False:  # no identity: for tests, and for those who load weights anyway
            nn.init.kaiming_uniform_(zero, a=math.sqrt(5))
        else:
            nn.init.zeros_(zero)

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.dropout and self.training and not self.embeds:
            x = F.dropout(x, self.dropout)
        # The base's precision: float32 products on a bfloat16 base would keep a float32 copy of every input.
        dtype = y.dtype if self.embeds else x.dtype
        h = weights.linear(site, x, self.A.to(dtype)) * self.scale
        y = y + weights.mix(site, h, self.B.to(dtype)).to(y.dtype)
        return y if self.bias is None else self.bias.add(site, y)

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        if self.B.shape[1] != len(self.A):
            raise MergeError("A grouped convolution sees its own share of the channels; LoRA's A sees all of them.")
        delta = (self.B @ self.A.flatten(1)).view(weight.shape) * self.scale
        return weight + delta.to(weight.dtype)

    def merged_bias(self, site: nn.Module, bias: Tensor | None) -> Tensor | None:
        return bias if self.bias is None else self.bias.fold(site, bias)

    def hf_key(self, name: str) -> str:
        if name == "bias.value":
            return "base_layer.bias"
        return f"lora_embedding_{name}" if self.embeds else f"lora_{name}.weight"

    def hf_shape(self, name: str, value: Tensor) -> tuple[int, ...]:
        return (*value.shape, *[1] * (self.A.dim() - 2)) if name == "B" else tuple(value.shape)


class LoraConfig(TargetConfig):
    """LoRA's settings.

    r: rank. lora_alpha: s = lora_alpha / r. lora_dropout: probability, on the input of A. bias: which biases are
    trained as well, "none", "all" or those of the targets ("lora_only"). use_rslora: s = lora_alpha / sqrt(r).
    rank_pattern, alpha_pattern: other values for the modules a key (a regular expression for the end of the name)
    means. init_lora_weights: True (A as nn.Linear's default, B zero), "gaussian" (A normal with deviation 1 / r), or
    False (both random). fan_in_fan_out is set by itself: the layer tells how it stores its weight.
    """

    peft_type: ClassVar[str] = "LORA"
    hf_prefix: ClassVar[str] = "lora_"
    hf_only: ClassVar[dict[str, Any]] = {
        "alora_invocation_tokens": None, "arrow_config": None, "corda_config": None, "ensure_weight_tying": False,
        "eva_config": None, "kasa_config": None, "layer_replication": None, "loftq_config": {}, "lora_bias": False,
        "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "monteclora_config": None,
        "qalora_group_size": 16, "target_parameters": None, "trainable_token_indices": None, "use_bdlora": None,
        "use_dora": False, "use_qalora": False, "velora_config": None,
    }  # fmt: skip

    r: int = Field(8, ge=1)
    lora_alpha: int | float = 8
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int | float] = {}

    def resolved(self, model: nn.Module) -> "LoraConfig":
        config = super().resolved(model)
        fan = any(weights.is_gpt2_conv1d(site) for site in config.find(model).values())
        return config.model_copy(update={"fan_in_fan_out": fan})

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        lora = {name: adapter for name, adapter in made.items() if isinstance(adapter, LoraAdapter)}
        targets = [pattern_name(name, lora) for name in lora]
        for target, (name, adapter) in zip(targets, lora.items(), strict=True):
            if target != name:  # an attention's output projection
                adapter.scale *= 2
        check_patterns("rank_pattern", self.rank_pattern, targets)
        check_patterns("alpha_pattern", self.alpha_pattern, targets)
        if self.bias == "all":
            copied = tuple(f"{name}." for name, adapter in made.items() if adapter.replacement is not None)
            for name, module in base_modules(model):
                if has_bias(module) and name not in made and not name.startswith(copied):
                    made[name] = BiasAdapter(module)
        return made

    def build(self, name: str, site: nn.Module) -> LoraAdapter:
        r = pattern_value(self.rank_pattern, name, self.r)
        alpha = pattern_value(self.alpha_pattern, name, self.lora_alpha)
        shape = weights.layout(site)
        assert shape is not None
        if r < 1 or r % shape.groups:
            raise ConfigError(f"{name} has {shape.groups} groups: its rank must be a multiple of that, not {r}.")
        adapter = LoraAdapter(
            site, r, alpha / (math.sqrt(r) if self.use_rslora else r), self.lora_dropout, self.init_lora_weights
        )
        if self.bias != "none" and has_bias(site):
            adapter.bias = TrainedBias(site)
        return adapter
