"""How a method takes part in training, whatever the loop: a term of the loss, and a call after each optimizer step.

`Trainer`, accelerate and a loop by hand have in common that they call the model and step an optimizer of PyTorch's.
So the term is added by a forward hook on the model, and the call comes from PyTorch's hook for all optimizers.
"""

import functools
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .adapter import PeftConfig
from .attach import Trunk, trunk
from .rows import BASE


class Listener:
    """The forward hook of one model. It goes with the model where that is copied or pickled."""

    own: Trunk
    asked: bool  # since the last step of the optimizer: for the penalty, by whomever
    added: bool  # since then: to the model's loss

    def __init__(self, own: Trunk) -> None:
        self.__setstate__({"own": own, "asked": False, "added": False})

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _listeners.add(self)
        _hear_optimizers()

    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Add the penalty to the loss that the model returns, in training."""
        if not model.training or not torch.is_grad_enabled():
            return
        # Trainer gives the number of items in all the batches of one step, and then sums their losses: once will do.
        if self.added and kwargs.get("num_items_in_batch") is not None:
            return
        if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
            term = self.penalty()
            self.added = True
            if term is not None:
                output["loss"] = output["loss"] + term.to(output["loss"])

    def penalty(self) -> Tensor | None:
        """The sum of the penalties of the adapters that act and train."""
        self.asked = True
        terms = [config.penalty(self.own.adapters(name)) for name, config in self._training()]
        found = [term for term in terms if term is not None]
        return functools.reduce(lambda total, term: total + term.to(total.device), found) if found else None

    def stepped(self, optimizer: Optimizer) -> None:
        own = False
        for name, config in self._training():
            adapters = self.own.adapters(name)
            first = next((parameter for adapter in adapters.values() for parameter in adapter.parameters()), None)
            if not any(parameter is first for group in optimizer.param_groups for parameter in group["params"]):
                continue  # the optimizer of something else
            own = True
            if not self.asked and config.penalty(adapters) is not None:
                warnings.warn(
                    f"The model returned no loss to which {type(config).__name__} could add its penalty. Give it "
                    "labels, or add model.penalty() to your loss.",
                    stacklevel=2,
                )
            config.stepped(adapters, optimizer)
        if own:
            self.asked = self.added = False

    def _training(self) -> list[tuple[str, PeftConfig]]:
        active = self.own.active
        acting = [name for name in active.rows.groups if name != BASE] if active.rows else active.names
        named = [(name, self.own.configs[name]) for name in acting]
        return [(name, config) for name, config in named if not config.inference_mode]


_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()


@functools.cache
def _hear_optimizers() -> None:
    def hook(optimizer: Optimizer, *_: Any) -> None:
        with torch.no_grad():
            for listener in list(_listeners):
                listener.stepped(optimizer)

    register_optimizer_step_post_hook(hook)


def listener(model: nn.Module) -> Listener | None:
    return next((hook for hook in model._forward_hooks.values() if isinstance(hook, Listener)), None)


def listen(model: nn.Module) -> None:
    """Let the model's methods take part in its training, where one of them does."""
    own = trunk(model)
    if listener(model) is None and any(_takes_part(config) for config in own.configs.values()):
        model.register_forward_hook(Listener(own), with_kwargs=True)


def stop(model: nn.Module) -> None:
    """The model trains as any other again."""
    hooks = model._forward_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, Listener)]:
        del hooks[key], model._forward_hooks_with_kwargs[key]


def _takes_part(config: PeftConfig) -> bool:
    own = type(config)
    return own.penalty is not PeftConfig.penalty or own.stepped is not PeftConfig.stepped
