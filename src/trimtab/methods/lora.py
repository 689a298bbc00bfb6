"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = W x + s B A x.

A (r, in) starts random and B (out, r) at zero, so that nothing changes at first; s = alpha / r, or alpha / sqrt(r)
with rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732). Dropout acts on x before A. On a convolution A
is a convolution with the site's kernel, stride and padding to r channels and B one with kernel 1; an embedding of
V rows is the linear map of one-hot vectors, so A is (r, V).

    use_dora        y = g (W x + s B A x) + b,  g = m / ||W + s B A||, row by row, m trained      (dora.py)
    target_parameters   W + s B A of tensors that are no layer's weight, such as experts  (lora_parameters.py)
    pissa, olora    y = W x + s (B A - B0 A0) x,  B0 A0 from the SVD or QR of W, B A from there   (lora_init.py)

Where an nn.MultiheadAttention is a target, its output projection is one too, and there s is doubled: HF PEFT adds that
product twice, and an adapter must mean the same in both libraries.
"""

import math
import re
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from .. import kernels, weights
from ..adapter import Adapter
from ..errors import CheckpointError, ConfigError, MergeError, TargetError, did_you_mean
from ..rows import Group, Rows
from ..sites import AnySite
from ..targets import FanConfig, check_patterns, is_linear, pattern_name, pattern_value, shared
from . import lora_groups
from .alora import Invocation, invocation
from .bitfit import TrainedBias, add_biases, has_bias
from .dora import Magnitude
from .lora_init import (
    DATA_KINDS,
    KINDS,
    CordaConfig,
    EvaConfig,
    GivenStart,
    LoraGAConfig,
    Start,
    join,
    orthogonal_,
    part,
)
from .lora_parameters import parameter_adapters, parameters
from .trainable_tokens import token_adapters


class LoraAdapter(Adapter):
    adjusted: ClassVar[frozenset[str]] = frozenset({"A", "B", "rank", "scale"})

    def __init__(
        self,
        site: nn.Module,
        r: int,
        scale: float,
        dropout: float,
        init: bool | str,
        dora: bool = False,
        start: Start | None = None,
    ) -> None:
        """A (r, in, *kernel) and B (out, r / groups, *ones); scale is s, dropout a probability."""
        super().__init__()
        shape = weights.layout(site)
        assert shape is not None
        self.scale, self.dropout = scale, dropout
        self.embeds, self.is_linear = isinstance(site, nn.Embedding), is_linear(site)
        self.A = weights.new_parameter(site, r, shape.into, *shape.kernel)
        self.B = weights.new_parameter(site, shape.out, r // shape.groups, *[1] * len(shape.kernel))
        self.rank = r, min(shape.out, self.A[0].numel())
        self.bias: TrainedBias | None = None
        self.start = start
        self.invocation: Invocation | None = None
        if start is None:
            self._initialise(init)
        else:
            self.A.data.copy_(start.A)
            self.B.data.copy_(start.B)
        if isinstance(start, GivenStart):
            self.register_state_dict_post_hook(join)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_pre_hook(part)  # type: ignore[no-untyped-call]
        self.magnitude = Magnitude(site) if dora else None
        if self.magnitude is not None and not self.A.is_meta:
            self.magnitude.start(site, *self._change(), scale)

    def _initialise(self, init: bool | str) -> None:
        # On an embedding B is the random one: A's columns are rows of the vocabulary, of which a step sees few.
        zero, random = (self.A, self.B) if self.embeds else (self.B, self.A)
        if init == "orthogonal":
            orthogonal_(self.A, self.B)
            return
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
        base, p = y, self.dropout if self.training else 0.0
        if (W := self._base_weight(site, x, y)) is not None:
            y = kernels.adapted(y, x, W, self.A, self.B, self.scale, p)
        else:
            low = self._product(site, x, y.dtype, self.A, self.B, p)
            if self.start is not None:
                low = low - self._product(site, x, y.dtype, self.start.A, self.start.B)
            y = y + low
        if self.magnitude is not None:
            y = self.magnitude.rescale(site, y, *self._change(), self.scale)
        y = y if self.bias is None else self.bias.add(site, y)
        return y if self.invocation is None else self.invocation.select(base, y)

    def _base_weight(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        """W, where y is the base's own output and nobody needs it as it is; else None."""
        needed = self.start is not None or self.invocation is not None
        if needed or not kernels.fits(site, x) or not isinstance(site, AnySite) or not site.acts_alone(self):
            return None
        return kernels.base_weight(site, x, y)

    def _product(self, site: nn.Module, x: Tensor, dtype: torch.dtype, A: Tensor, B: Tensor, p: float = 0.0) -> Tensor:
        """s B A drop(x), in the dtype."""
        if kernels.fits(site, x):
            return kernels.product(x, A, B, self.scale, p).to(dtype)
        if p and not self.embeds:
            x = F.dropout(x, p)
        # The base's precision: float32 products on a bfloat16 base would keep a float32 copy of every input.
        own = dtype if self.embeds else x.dtype
        h = weights.linear(site, x, A.to(own)) * self.scale
        return weights.mix(site, h, B.to(own).flatten(1)).to(dtype)

    def joins(self, site: nn.Module) -> bool:
        plain = self.magnitude is None and self.start is None and self.invocation is None and self.bias is None
        return plain and self.is_linear and type(self) is LoraAdapter

    @classmethod
    def after_groups(
        cls, site: nn.Module, members: list[tuple["LoraAdapter", Group]], x: Tensor, y: Tensor, rows: Rows, own: bool
    ) -> Tensor:
        return lora_groups.after(site, members, x, y, rows, own)

    def _change(self) -> tuple[Tensor, Tensor]:
        """The pair whose product, times s, is added to W: A and B, and where they started elsewhere minus that."""
        if self.start is None:
            return self.A, self.B
        return torch.cat([self.A, self.start.A]), torch.cat([self.B, -self.start.B], 1)

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        if self.invocation is not None:
            return self.invocation.merged(site, weight)
        if self.B.shape[1] != len(self.A):
            raise MergeError("A grouped convolution sees its own share of the channels; LoRA's A sees all of them.")
        A, B = self._change()
        delta = (B.flatten(1) @ A.flatten(1)).view(weight.shape) * self.scale
        merged = weight + delta.to(weight.dtype)
        return merged if self.magnitude is None else self.magnitude.fold(site, merged, A, B, self.scale)

    def low_rank(self, site: nn.Module) -> tuple[Tensor, Tensor] | None:
        if self.magnitude is not None or self.invocation is not None or self.B.shape[1] != len(self.A):
            return None
        A, B = self._change()
        return B.flatten(1) * self.scale, A.flatten(1)

    def take(self, B: Tensor, A: Tensor, shift: Tensor | None) -> None:
        """Add B (out, n) times A (n, in * kernel) to the weight, n up to r, and the shift (out,) to a trained bias."""
        state = self.state_dict() | self._filled(B, A)
        if self.bias is not None and shift is not None:
            state["bias.value"] = self.bias.value + shift
        self.load_state_dict(state, assign=True)

    def state_of(self, other: Adapter) -> dict[str, Tensor]:
        """Lower ranks are filled up with zeros, and another scale is worked into B."""
        state = super().state_of(other)
        assert isinstance(other, LoraAdapter)
        same = (self.A.shape, self.B.shape, self.scale) == (other.A.shape, other.B.shape, other.scale)
        if same and not isinstance(other.start, GivenStart):
            return state
        if self.start is not None or self.B.shape[1] != len(self.A) or len(other.A) > len(self.A):
            raise CheckpointError(f"its rank is {len(other.A)} and its scale {other.scale:g}, here {len(self.A)} and "
                                  f"{self.scale:g}")  # fmt: skip
        return state | self._filled(other.B.flatten(1) * other.scale, other.A.flatten(1))

    def _filled(self, B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """A and B of this adapter's shapes whose product, times its scale, is that of these."""
        more = len(self.A) - len(A)
        filled = F.pad(A, (0, 0, 0, more)), F.pad(B / self.scale, (0, more))
        return {"A": filled[0].view(self.A.shape).clone(), "B": filled[1].view(self.B.shape).clone()}

    def merged_bias(self, site: nn.Module, bias: Tensor | None) -> Tensor | None:
        if self.magnitude is not None:
            bias = self.magnitude.fold_bias(site, bias, *self._change(), self.scale)
        return bias if self.bias is None else self.bias.fold(site, bias)

    def hf_key(self, name: str) -> str:
        if name == "bias.value":
            return "base_layer.bias"
        if name == "magnitude.value":
            return "lora_magnitude_vector"
        return f"lora_embedding_{name}" if self.embeds else f"lora_{name}.weight"


class LoraConfig(FanConfig):
    """LoRA's settings.

    r: rank. lora_alpha: s = lora_alpha / r. lora_dropout: probability, on the input of A. bias: which biases are
    trained as well, "none", "all" or those of the targets ("lora_only"). use_rslora: s = lora_alpha / sqrt(r).
    use_dora: learn the length of each row of the weight by itself (methods/dora.py). trainable_token_indices: ids of
    tokens whose embeddings are trained as well (methods/trainable_tokens.py), or ids by name of the table.
    rank_pattern, alpha_pattern: other values for the modules a key (a regular expression for the end of the name)
    means. init_lora_weights: True (A as nn.Linear's default, B zero), "gaussian" (A normal with deviation 1 / r),
    False (both random), or a start of methods/lora_init.py: "orthogonal", "pissa", "pissa_niter_K" (K rounds of a
    randomised SVD), "olora"; or of methods/lora_data.py: "eva" (eva_config), "corda" (corda_config), "lora_ga"
    (lora_ga_config), "loftq", each with a function to call.
    alora_invocation_tokens: act only from these tokens on (methods/alora.py).
    target_parameters: parameters to adapt that are no layer's weight, such as the experts of a mixture, by their full
    name or its last parts (methods/lora_parameters.py); where target_modules is None these alone are adapted.
    share_across_layers: one A and B for all layers, saved once (HF PEFT cannot read that). fan_in_fan_out is set by
    itself: the layer tells how it stores its weight.
    """

    peft_type: ClassVar[str] = "LORA"
    trains: ClassVar[str] = "low-rank A and B"
    when: ClassVar[str] = (
        'The first to try on almost any model and task; with target_modules="all-linear" where quality counts more '
        'than size. use_dora for low ranks, use_rslora for high ones, init_lora_weights="pissa" or "olora" to '
        "converge sooner."
    )
    evidence: ClassVar[str] = (
        "Hu et al. find it on a par with full fine-tuning or better on RoBERTa, DeBERTa, GPT-2 and GPT-3, where it "
        "trains up to 10,000 times fewer parameters, and that very low ranks do on their tasks. Dettmers et al. "
        "(QLoRA, 2023) need all linear layers for that. Biderman et al. (2024) find it behind full fine-tuning where "
        "much is to be learned, as in continued pretraining on code and mathematics, and forgetting less. "
        "Kalajdzievski shows that alpha / r holds high ranks back and alpha / sqrt(r) does not. DoRA's paper reports "
        "gains over LoRA on commonsense reasoning and vision and language, most at low ranks; each step takes longer. "
        "PiSSA's reports 72.86 % on GSM8K with Mistral-7B against LoRA's 67.7 %, and both it and OLoRA's that the "
        "loss falls faster; both need the base's weight again when the adapter is loaded."
    )
    hf_prefix: ClassVar[str] = "lora_"
    not_in_hf: ClassVar[frozenset[str]] = frozenset({"share_across_layers"})
    hf_only: ClassVar[dict[str, Any]] = {
        "arrow_config": None, "ensure_weight_tying": False,
        "kasa_config": None, "layer_replication": None, "loftq_config": {}, "lora_bias": False,
        "megatron_config": None, "megatron_core": "megatron.core", "monteclora_config": None,
        "qalora_group_size": 16, "use_bdlora": None, "use_qalora": False, "velora_config": None,
    }  # fmt: skip

    r: int = Field(default=8, ge=1)
    lora_alpha: int | float = 8
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int | float] = {}
    share_across_layers: bool | None = None
    target_parameters: list[str] | None = Field(default=None, min_length=1)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    alora_invocation_tokens: list[int] | None = Field(default=None, min_length=1)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    _given: dict[str, tuple[Tensor, Tensor]] = PrivateAttr(default_factory=dict)

    @field_validator("init_lora_weights")
    @classmethod
    def _known(cls, value: bool | str) -> bool | str:
        if isinstance(value, str) and not re.fullmatch(f"gaussian|orthogonal|{'|'.join(DATA_KINDS)}|{KINDS}", value):
            known = ("gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", *DATA_KINDS)
            raise ValueError(f"no start is known by that name.{did_you_mean(value, known)}")
        return value

    @property
    def acts_on_rows(self) -> bool:
        return self.alora_invocation_tokens is not None

    def resolved(self, model: nn.Module) -> "LoraConfig":
        alone = self.target_parameters is not None and self.target_modules is None
        given = self.model_copy(update={"target_modules": []}) if alone else self
        return super(LoraConfig, given).resolved(model)

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        return {} if self.target_parameters and not self.target_modules else super().find(model)

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        lora = {name: adapter for name, adapter in made.items() if isinstance(adapter, LoraAdapter)}
        targets = [pattern_name(name, lora) for name in lora]
        for target, (name, adapter) in zip(targets, lora.items(), strict=True):
            if target != name:  # an attention's output projection
                adapter.scale *= 2
        if self.target_parameters:
            self._check_parameters()
            named = self.in_layers(parameters(model, self.target_parameters))
            whole = parameter_adapters(model, named, made, self.rank_and_scale, self.init_lora_weights)
            targets += named
            made |= whole
        check_patterns("rank_pattern", self.rank_pattern, targets)
        check_patterns("alpha_pattern", self.alpha_pattern, targets)
        if self.share_across_layers:
            self._check_sharing()
            made = shared(made)
        if self.alora_invocation_tokens:
            made[""] = asked = invocation(model, self.alora_invocation_tokens, lora, self)
            for adapter in lora.values():
                adapter.invocation = asked
        if self.trainable_token_indices:
            tokens = token_adapters(model, self.trainable_token_indices)
            if both := sorted(tokens.keys() & made.keys()):
                raise TargetError(f"{both[0]} is adapted or saved whole, and holds tokens of trainable_token_indices: "
                                  "leave it out of one of them.")  # fmt: skip
            made |= tokens
        return add_biases(made, model) if self.bias == "all" else made

    def _check_sharing(self) -> None:
        plain = not str(self.init_lora_weights).startswith(("pissa", "olora", *DATA_KINDS))
        settings = {"bias": "none", "use_dora": False, "alpha_pattern": {}}
        self._check_beside("share_across_layers=True", "makes the adapter of each layer its own", settings, plain)

    def _check_parameters(self) -> None:
        plain = self.init_lora_weights in (True, False, "gaussian")
        settings = {"lora_dropout": 0, "use_dora": False, "alora_invocation_tokens": None}
        self._check_beside("target_parameters", "needs a layer with a weight, an input and an output", settings, plain)

    def _check_beside(self, setting: str, reason: str, others: dict[str, Any], plain_init: bool) -> None:
        differ = [other for other, value in others.items() if getattr(self, other) != value]
        differ += [] if plain_init else ["init_lora_weights"]
        if differ:
            raise ConfigError(f"{differ[0]}={getattr(self, differ[0])!r} {reason}: it cannot go with {setting}.")

    @property
    def given_starts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A0 and B0 by module name, where they were found in data (methods/lora_data.py)."""
        return self._given

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        r = pattern_value(self.rank_pattern, name, self.r)
        alpha = pattern_value(self.alpha_pattern, name, self.lora_alpha)
        return r, alpha / (math.sqrt(r) if self.use_rslora else r)

    def to_save(self) -> "LoraConfig":
        """A start found in data is in the weights; with A0 and B0 among them, the rank is twice that of training."""
        if self.init_lora_weights not in DATA_KINDS:
            return self
        plain: dict[str, Any] = dict.fromkeys(("eva_config", "corda_config", "lora_ga_config"))
        plain["init_lora_weights"] = True
        if self.given_starts:
            more = math.sqrt(2) if self.use_rslora else 2  # keeps s
            plain |= {"r": 2 * self.r, "lora_alpha": more * self.lora_alpha}
            plain["rank_pattern"] = {name: 2 * r for name, r in self.rank_pattern.items()}
            plain["alpha_pattern"] = {name: more * alpha for name, alpha in self.alpha_pattern.items()}
        return self.model_copy(update=plain)

    def _start(self, name: str, site: nn.Module) -> Start | None:
        kind, (r, scale) = str(self.init_lora_weights), self.rank_and_scale(name)
        if re.fullmatch(KINDS, kind):
            return Start.of_weight(name, site, r, scale, kind)
        if kind == "loftq" and not weights.is_quantized(site):
            raise ConfigError(f"{name} is not quantized, and LoftQ makes up for what that loses. Load the model in "
                              "4 bit, then call replace_lora_weights_loftq(model).")  # fmt: skip
        if kind not in ("corda", "lora_ga"):
            return None
        if name not in self.given_starts:
            function = {"corda": "preprocess_corda", "lora_ga": "preprocess_loraga"}[kind]
            raise ConfigError(f"{name} has no start from data: call {function}(model, config, ...) first. (HF PEFT's "
                              "files are of a changed base, except those that were saved with "
                              "path_initial_model_for_weight_conversion.)")  # fmt: skip
        A, B = self.given_starts[name]
        if A.shape[0] != r:
            raise ConfigError(f"{name} has a start from data of rank {A.shape[0]}, not {r}. Find it again.")
        return GivenStart(A.to(weights.device(site)).clone(), B.to(weights.device(site)).clone())

    def build(self, name: str, site: nn.Module) -> LoraAdapter:
        r = pattern_value(self.rank_pattern, name, self.r)
        shape = weights.layout(site)
        assert shape is not None
        if r < 1 or r % shape.groups:
            raise ConfigError(f"{name} has {shape.groups} groups: its rank must be a multiple of that, not {r}. "
                              f"Closest: {max(1, round(r / shape.groups)) * shape.groups}.")  # fmt: skip
        if self.use_dora and shape.groups > 1:
            raise ConfigError(f"{name} has {shape.groups} groups: DoRA measures the rows of one product B A. "
                              "Leave it out with exclude_modules, or set use_dora=False.")  # fmt: skip
        _, scale = self.rank_and_scale(name)
        start, init = self._start(name, site), self.init_lora_weights
        adapter = LoraAdapter(site, r, scale, self.lora_dropout, init, self.use_dora, start)
        if self.bias != "none" and has_bias(site):
            adapter.bias = TrainedBias(site)
        return adapter
