"""Layers that learn one after another, or each at its own rate (Howard and Ruder 2018, ULMFiT, arXiv 1801.06146).

What is trained falls into G groups from input to output. A group is a layer, that is an item of the outermost numbered
list that its modules' names go through (`encoder.layer.3`), or what is registered between two layers: embeddings come
first, with the virtual tokens of prompts; final norms and heads come last.

Gradual unfreezing (section 3.3): the group k, counted from 0 at the end where it begins, trains from step

    ceil(k ratio T / G)

of T on, so that each group gets as many steps before the next joins. With ratio = 1 and as many epochs as groups that
is the paper's epoch for each; there it begins at the output. What is frozen has no gradient, so that no optimizer moves
it, by weight decay or otherwise.

Layer-wise learning rates (section 3.2, "discriminative fine-tuning"): the group k, counted from 0 at the output, learns
at the rate  lr decay^k. The paper's decay is 1/2.6. Above 1 the input learns fastest.
"""

import math
import re
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback

from .errors import ConfigError
from .sites import AnySite, adapters
from .targets import base_modules

End = Literal["input", "output"]


def groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """What trains, from input to output; what layers share counts as the first one's.

    Raises:
        ConfigError: it all lies in one place.
    """
    found: list[list[nn.Parameter]] = []
    seen: set[nn.Parameter] = set()
    last = None
    for path, module in [("", model), *base_modules(model)]:
        layer = re.match(r"(?:.*?\.)?\d+(?=\.|$)", path)
        if (here := layer and layer[0]) != last or not found:
            found.append([])
        last = here
        own = [*module.parameters(recurse=False)]
        if isinstance(module, AnySite):
            own += adapters(module).parameters()
        found[-1] += [parameter for parameter in own if parameter.requires_grad and parameter not in seen]
        seen.update(own)
    trained = [group for group in found if group]
    if len(trained) < 2:
        raise ConfigError("All that is trained lies in one place of the model: no layer can go before another. Leave "
                          "out training.gradual_unfreezing and training.layerwise_lr_decay.")  # fmt: skip
    return trained


def rates(model: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """How much of the learning rate each parameter has: decay^k."""
    return {parameter: decay**k for k, group in enumerate(reversed(groups(model))) for parameter in group}


class GradualUnfreezing(TrainerCallback):
    """What is frozen follows from the step alone, so that a run that is resumed goes on as it was."""

    def __init__(self, model: nn.Module, begin: End, ratio: float) -> None:
        found = groups(model)
        self.groups = found if begin == "input" else found[::-1]
        self.ratio = ratio

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for k, group in enumerate(self.groups):
            trains = state.global_step >= math.ceil(k * self.ratio * state.max_steps / len(self.groups))
            for parameter in group:
                parameter.requires_grad_(trains)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for group in self.groups:
            for parameter in group:
                parameter.requires_grad_(True)
