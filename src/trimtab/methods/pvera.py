"""PVeRA (Fillioux et al. 2025, arXiv 2512.07703): y = W x + l_b * (B z), z drawn from the normal N(m, exp(v)).

Mean m (r,) and logarithm of the variance v (r,) are the two halves of l_d * (A x), with A (2 r, in) and B (out, r)
random, frozen and shared by all sites as in VeRA; a site trains l_d (2 r,), started at d_initial, and l_b (out,),
started at zero. While training, z = m + exp(v / 2) e with e standard normal; afterwards z = m, unless
sample_at_inference says to draw there as well. What is merged is the mean.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .vera import ProjectedAdapter, ProjectedConfig


class PveraAdapter(ProjectedAdapter):
    hf_names: ClassVar[dict[str, str]] = {
        "lambda_b": "pvera_lambda_b", "lambda_d": "pvera_lambda_d"
    }  # fmt: skip
    hf_shared: ClassVar[dict[str, str]] = {"shared.A": "base_model.pvera_A", "shared.B": "base_model.pvera_B"}

    draws: ClassVar[bool] = True
    always = False  # in evaluation, too

    def inner(self, h: Tensor) -> Tensor:
        mean, log_variance = h.chunk(2, -1)
        if not (self.training or self.always):
            return mean
        return mean + (log_variance / 2).exp() * torch.randn_like(mean)


class PveraConfig(ProjectedConfig):
    """PVeRA's settings; those of ProjectedConfig, and:

    pvera_dropout: probability, on the input of A. sample_at_inference: draw in evaluation, too. bias: which biases are
    trained as well, "none", "all" or those of the targets ("pvera_only"). HF PEFT's generator_seed is not offered:
    torch.manual_seed decides what is drawn, and a generator apart would draw anew under gradient checkpointing.
    """

    peft_type: ClassVar[str] = "PVERA"
    trains: ClassVar[str] = "two vectors of scales, with a spread"
    relative_rate: ClassVar[float] = 5.0
    when: ClassVar[str] = "As VeRA, where the model should also tell how sure it is: draw several answers, and compare."
    evidence: ClassVar[str] = (
        "Fillioux et al. report better results than VeRA and other adapters with a vision transformer on VTAB-1k. The "
        "noise is that of training only unless sample_at_inference asks for it, and merging leaves it out."
    )
    hf_prefix: ClassVar[str] = "pvera_"
    hf_only: ClassVar[dict[str, Any]] = {"generator_seed": None}

    pvera_dropout: float = Field(default=0.0, ge=0, lt=1)
    bias: Literal["none", "all", "pvera_only"] = "none"
    sample_at_inference: bool = False

    def build(self, name: str, site: nn.Module) -> PveraAdapter:
        adapter = PveraAdapter(site, 2 * self.r, self.d_initial, self.pvera_dropout, self.init_weights)
        adapter.always = self.sample_at_inference
        return self.biased(adapter, site)
