"""LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199): attention to K learned tokens is added, behind a gate at zero.

In the top L layers, with the layer's own projections W of queries (rotated by their positions), keys and values:

    y = attention(x) + W_o [g softmax((W_q x)(W_k P)^T / sqrt(d)) W_v P],   P (K, width) learned, g learned from 0

The learned tokens have no positions and a softmax of their own. On GPT-2 HF PEFT adds what is in brackets without
W_o; so does this, since its adapters would else mean something else.
"""

import math
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import caches, weights
from ..adapter import Adapter, InputAdapter
from ..errors import ConfigError, TargetError, did_you_mean
from ..targets import SavedModulesConfig, base_modules, matches

# Names of the projections of queries, keys, values and output; the last is None where it follows outside the module.
PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # LLaMA, Mistral and most others
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, BART
    ("query", "key", "value", None),  # BERT, RoBERTa
)


class AdaptionPrompt(InputAdapter):
    def __init__(self, site: nn.Module, tokens: int, width: int) -> None:
        super().__init__()
        self.adaption_prompt = weights.new_parameter(site, 1, tokens, width)
        self.adaption_gate = weights.new_parameter(site, 1)
        nn.init.normal_(self.adaption_prompt)
        nn.init.zeros_(self.adaption_gate)

    def outputs(self, site: Any, given: dict[str, Any], result: Any) -> Any:
        x, width = given["hidden_states"], head_width(site)
        prompt = self.adaption_prompt.to(x.dtype)
        parts = projections(site)
        if parts:
            q, k, v = (getattr(site, part)(of) for part, of in zip(parts[:3], (x, prompt, prompt), strict=True))
        else:
            (q, _, _), (_, k, v) = site.c_attn(x).chunk(3, -1), site.c_attn(prompt).chunk(3, -1)
        q = _heads(q, width)
        if given.get("position_embeddings") is not None:
            q = _rotated(q, *given["position_embeddings"])
        k, v = _heads(k, width), _heads(v, width)  # (1, heads of keys, K, width of a head)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(2, 3) / math.sqrt(width)
        scores = scores.softmax(-1, dtype=weights.master_dtype(q.dtype)).to(q.dtype)
        added = (self.adaption_gate.to(q.dtype) * scores @ v).transpose(1, 2).flatten(2)  # (B, T, heads * width)
        out = getattr(site, parts[3]) if parts and parts[3] else nn.Identity()
        return (result[0] + out(added), *result[1:])


def projections(site: nn.Module) -> tuple[str, str, str, str | None] | None:
    """The names of a module's projections, unless they are one."""
    return next((names for names in PROJECTIONS if all(hasattr(site, name) for name in names if name)), None)


def head_width(site: nn.Module) -> int:
    width = getattr(site, "head_dim", None) or getattr(site, "attention_head_size", None)
    return width if isinstance(width, int) else 0


def _heads(x: Tensor, width: int) -> Tensor:
    """(B, T, heads * width) -> (B, heads, T, width)."""
    return x.view(*x.shape[:-1], -1, width).transpose(1, 2)


def _rotated(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): cos, sin (B, T, width of a head)."""
    first, second = q.chunk(2, -1)
    return q * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)


class AdaptionPromptConfig(SavedModulesConfig):
    """LLaMA-Adapter's settings.

    adapter_len: K, 10 by default as in the paper. adapter_layers: L, all by default. target_modules: the name of
    attention, found out by itself.
    """

    peft_type: ClassVar[str] = "ADAPTION_PROMPT"
    trains: ClassVar[str] = "prompts of attention, and gates"
    relative_rate: ClassVar[float] = 8.0
    when: ClassVar[str] = "Decoders, LLaMA above all, that are to follow instructions without losing what they know."
    evidence: ClassVar[str] = (
        "The gate starts at zero, so training starts from the model as it was; Zhang et al. train 1.2 million "
        "parameters of LLaMA 7B in less than an hour on eight A100. A second, small attention in each layer remains "
        "at inference; LoRA, which can be merged, is the usual choice today."
    )
    hf_prefix: ClassVar[str] = "adaption_"

    target_modules: str | None = None
    adapter_len: int = Field(default=10, ge=1)
    adapter_layers: int | None = Field(default=None, ge=1)

    def resolved(self, model: nn.Module) -> Self:
        found = list(caches.readers(model))
        names = list(dict.fromkeys(name.rpartition(".")[2] for name in found))
        if not found:
            raise TargetError(f"{type(model).__name__} has no attention with a cache, as LLaMA has. Use LoraConfig.")
        name, layers = self.target_modules or names[0], self.adapter_layers or len(found)
        if name not in names:
            raise TargetError(f"target_modules={name!r} is no attention of the model.{did_you_mean(name, names)}")
        if layers > len(found):
            raise ConfigError(f"adapter_layers={layers}, but the model has {len(found)}. Closest: {len(found)}.")
        return super().resolved(model).model_copy(update={"target_modules": name, "adapter_layers": layers})

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        assert self.target_modules is not None
        assert self.adapter_layers is not None
        modules = dict(base_modules(model))
        found = [name for name in caches.readers(model) if matches(self.target_modules, name)]
        made: dict[str, Adapter] = {}
        for name in found[-self.adapter_layers :]:
            site = modules[name]
            known = head_width(site) and (projections(site) or hasattr(site, "c_attn"))
            if not known or hasattr(site, "q_norm"):
                raise TargetError(
                    f"{name} is a {type(site).__name__}, which LLaMA-Adapter does not know. It knows the attention of "
                    "LLaMA, Mistral, GPT-2, OPT and BERT. Use a method at layers, such as LoraConfig."
                )
            width = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
            made[name] = AdaptionPrompt(site, self.adapter_len, width)
        return made | self.trained_copies(model)

    def to_dict(self) -> dict[str, Any]:
        """Without modules_to_save where there is none, since HF PEFT's config of this method does not know it."""
        return {key: value for key, value in super().to_dict().items() if key != "modules_to_save" or value}
