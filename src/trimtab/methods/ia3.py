"""IA3 (Liu et al. 2022, arXiv 2205.05638): y = l * (W x + b), or y = W (l * x) + b at feed-forward modules.

l is learned, one number per output feature (per input feature at feed-forward modules), and starts at one. The paper
scales keys, values and the inner activations of the feed-forward part, which are the input of its second layer.
"""

from typing import Any, ClassVar

import torch
from pydantic import field_validator
from torch import Tensor, nn

from .. import weights
from ..adapter import Adapter
from ..errors import ConfigError, TargetError, did_you_mean
from ..targets import ALL_LINEAR, FanConfig, base_modules, means

# Keys, values and the feed-forward part's second layer, by the names they go under.
PARTS = (
    (("k_proj", "v_proj"), "down_proj"),
    (("k_proj", "v_proj"), "fc2"),
    (("k_proj", "v_proj"), "fc_out"),
    (("key", "value"), "output.dense"),
    (("k", "v"), "wo"),
    (("k_lin", "v_lin"), "lin2"),
    (("key_proj", "value_proj"), "output.dense"),
    (("c_attn",), "mlp.c_proj"),
    (("query_key_value",), "dense_4h_to_h"),
    (("qkv_proj",), "down_proj"),
)


class IA3Adapter(Adapter):
    hf_names: ClassVar[dict[str, str]] = {"scale": "ia3_l"}

    def __init__(self, site: nn.Module, feedforward: bool, init: bool) -> None:
        """scale holds l in HF PEFT's shapes: (out, 1), feed-forward (1, in), on convolutions (1, features, 1, ...)."""
        super().__init__()
        shape = weights.layout(site)
        assert shape is not None
        self.feedforward = feedforward
        features = shape.into if feedforward else shape.out
        if shape.kernel:
            sizes: tuple[int, ...] = (1, features, *[1] * len(shape.kernel))
        else:
            sizes = (1, features) if feedforward else (features, 1)
        self.scale = weights.new_parameter(site, *sizes)
        if init:
            nn.init.ones_(self.scale)
        else:  # no identity: for tests, and for those who load weights anyway
            nn.init.normal_(self.scale)

    def _times(self, site: nn.Module, values: Tensor) -> Tensor:
        """l * values (..., features), or ([B,] features, ...) around convolutions."""
        l = self.scale.flatten().to(values.dtype)  # noqa: E741 - the paper's name
        return values * (l.view(-1, *[1] * len(site.kernel_size)) if isinstance(site, weights.CONVOLUTIONS) else l)

    def before(self, site: nn.Module, x: Tensor) -> Tensor:
        return self._times(site, x) if self.feedforward else x

    def after(self, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return y if self.feedforward else self._times(site, y)

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        l = self.scale.flatten().to(weight.dtype)  # noqa: E741
        if not self.feedforward:
            return weight * l.view(-1, *[1] * (weight.dim() - 1))
        groups = len(l) // weight.shape[1]  # each group of outputs sees its share of the inputs
        per_output = l.view(groups, 1, -1).expand(-1, len(weight) // groups, -1).reshape(weight.shape[:2])
        return weight * per_output.view(*weight.shape[:2], *[1] * (weight.dim() - 2))

    def merged_bias(self, site: nn.Module, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or self.feedforward else bias * self.scale.flatten().to(bias.dtype)

    def neutral(self, site: nn.Module) -> dict[str, Tensor]:
        return {"scale": torch.ones_like(self.scale)}


class IA3Config(FanConfig):
    """IA3's settings.

    feedforward_modules: those of the targets whose input is scaled instead of their output, as names (full, or last
    parts) or a regular expression; None means none of them, or with target_modules=None the paper's choice.
    init_ia3_weights: start at one; False starts at random. fan_in_fan_out needs no setting: the layer tells.
    """

    peft_type: ClassVar[str] = "IA3"
    trains: ClassVar[str] = "one factor per feature"
    relative_rate: ClassVar[float] = 8.0
    when: ClassVar[str] = "Few examples, many tasks, very small files: a vector per layer is all that a task adds."
    evidence: ClassVar[str] = (
        "Liu et al. find it the one method of those they compare that beats full fine-tuning of T0 with few examples, "
        "and with it (T-Few) do better than GPT-3 with the same examples in its context. It can only turn features up "
        "and down, so it has less room than LoRA where there is much data, and it wants a larger learning rate."
    )
    hf_prefix: ClassVar[str] = "ia3_"
    not_in_hf: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})

    feedforward_modules: list[str] | str | None = None
    init_ia3_weights: bool = True

    @field_validator("feedforward_modules", mode="before")
    @classmethod
    def _sorted(cls, value: Any) -> Any:
        return sorted(value) if isinstance(value, set | frozenset) else value

    def default_targets(self, model: nn.Module) -> list[str]:
        projections, second = _parts(model)
        return [*projections, second]

    def resolved(self, model: nn.Module) -> "IA3Config":
        config = super().resolved(model)
        feedforward = self.feedforward_modules
        if feedforward is None:
            feedforward = [_parts(model)[1]] if self.target_modules is None else []
        return config.model_copy(update={"feedforward_modules": feedforward})

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        made = super().adapters(model)
        entries = self.feedforward_modules or []
        for entry in [entries] if isinstance(entries, str) else entries:
            wanted = entry if isinstance(entries, str) else [entry]
            if not any(means(wanted, name) for name, adapter in made.items() if isinstance(adapter, IA3Adapter)):
                raise ConfigError(f"feedforward_modules: {entry!r} matches no target.{did_you_mean(entry, made)}")
        return made

    def build(self, name: str, site: nn.Module) -> IA3Adapter:
        feedforward = means(self.feedforward_modules or [], name)
        if feedforward and isinstance(site, nn.Embedding):
            raise TargetError(f"{name} is an Embedding: its input are ids, which cannot be scaled. "
                              "Leave it out of feedforward_modules.")  # fmt: skip
        return IA3Adapter(site, feedforward, self.init_ia3_weights)


def _parts(model: nn.Module) -> tuple[tuple[str, ...], str]:
    names = [name for name, module in base_modules(model) if weights.layout(module)]
    for projections, second in PARTS:
        if all(any(means([end], name) for name in names) for end in (*projections, second)):
            return projections, second
    raise TargetError(
        f"target_modules=None means keys, values and the feed-forward part, which {type(model).__name__} has under "
        f"no known name. Give target_modules and feedforward_modules, or target_modules='{ALL_LINEAR}'."
    )
