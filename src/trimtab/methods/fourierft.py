"""FourierFT (Gao et al. 2024, arXiv 2405.03003): y = W x + b + s Re(IDFT(F)) x, F (out, in) zero but for n numbers.

IDFT is the two-dimensional inverse Fourier transform, with its factor 1 / (out * in). Trained are the n real numbers;
their places in F are random, and the same for all weights of a size. The numbers start from a normal distribution, as
in the paper, so that the change is small at first, but not zero; with init_weights=True at zero.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .spectrum import SpectrumAdapter, SpectrumConfig


class FourierFTAdapter(SpectrumAdapter):
    hf_names: ClassVar[dict[str, str]] = {"spectrum": "fourierft_spectrum"}

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        F = self.sparse(shape[0], torch.Size(shape[1:]).numel())
        waves: Tensor = torch.fft.ifft2(F).real
        return waves.view(shape) * self.scale


class FourierFTConfig(SpectrumConfig):
    """FourierFT's settings; those of SpectrumConfig, and:

    bias: which biases are trained as well, "none", "all" or those of the targets ("fourier_only"). init_weights=True
    starts at zero, so that nothing changes at first.
    """

    peft_type: ClassVar[str] = "FOURIERFT"
    trains: ClassVar[str] = "a few entries of the change's spectrum"
    relative_rate: ClassVar[float] = 20.0
    when: ClassVar[str] = "Very small files at a rank that is not low; many adapters of one base."
    evidence: ClassVar[str] = (
        "Gao et al. report results like LoRA's or better on GLUE, E2E, instruction tuning and image classification "
        "with a small part of its parameters. A matrix as large as the weight is transformed in every step, and the "
        "learning rate and the scale must be large."
    )
    hf_prefix: ClassVar[str] = "fourierft_"

    n_frequency: int = Field(default=1000, ge=1)
    scaling: float = 150.0
    bias: Literal["none", "all", "fourier_only"] = "none"
    init_weights: bool = False

    def build(self, name: str, site: nn.Module) -> FourierFTAdapter:
        n, std = self.frequencies(name, site), 0.0 if self.init_weights else 1.0
        return self.biased(FourierFTAdapter(site, n, self.random_loc_seed, self.scaling, std), site)
