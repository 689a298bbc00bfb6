"""Optimizers made for LoRA: LoRA+ and LoRA-FA. For transformers.Trainer: `optimizers=(optimizer, None)`.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns with another rate than A, lr_B = ratio lr_A, since B starts at
zero and A does not. The paper reports 1 to 2 points more than LoRA, and up to twice its speed; the ratio is one more
setting to get right.

LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): A stays as it started, so that the inputs of layers need not be kept for
its gradient. The gradient of B becomes the one for which s g_B' A is closest to the gradient of the whole weight,

    g_B' = g_B (A A^T)^-1 / s^2

The paper reports results close to LoRA's with up to 1.4 times less memory. B alone can express less than A and B.
The rest is PyTorch's AdamW, which adds eps after the correction of bias; HF PEFT adds it before.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .attach import trunk
from .errors import ConfigError
from .methods.lora import LoraAdapter, LoraConfig
from .methods.lora_parameters import Pair

DAMPING = 1e-8  # as in HF PEFT
EMBEDDING_LR = 1e-6  # of LoRA at embeddings, as in HF PEFT


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = EMBEDDING_LR,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer of all that trains, in which B and the biases have lr times the ratio, as in HF PEFT.

    Args:
        loraplus_weight_decay: of all but biases and norms.
        loraplus_lr_embedding: the rate of A and B at embeddings.
        kwargs: for the optimizer.
    Raises:
        ConfigError: no B of LoRA trains, or a weight_decay, which is loraplus_weight_decay here.
    """
    if "weight_decay" in kwargs:
        raise ConfigError("LoRA+ decays by group: give loraplus_weight_decay instead of weight_decay.")
    found = loraplus_rates(model, loraplus_lr_ratio, loraplus_lr_embedding / lr)
    groups: dict[float, list[nn.Parameter]] = {loraplus_weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = model.get_submodule(name.rpartition(".")[0])
            decayed = "bias" not in name and not type(owner).__name__.endswith("Norm")
            groups[loraplus_weight_decay if decayed else 0.0].append(parameter)
    listed = [{"params": group, "weight_decay": decay} for decay, group in groups.items() if group]
    return with_rates(optimizer_cls(listed, **{"lr": lr, **kwargs}), found)


def loraplus_rates(model: nn.Module, ratio: float, embedding: float) -> dict[nn.Parameter, float]:
    """How much of the learning rate each parameter has. Raises: ConfigError, where no B of LoRA trains."""
    if not _trained(model):
        raise ConfigError("LoRA+ gives LoRA's B its own learning rate, and no such B trains here. Attach a LoraConfig, "
                          "or use a plain optimizer.")  # fmt: skip
    found = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            faster = (isinstance(module, LoraAdapter | Pair) and parameter is module.B) or parameter.ndim == 1
            embeds = isinstance(module, LoraAdapter) and module.embeds
            found[parameter] = embedding if embeds else ratio if faster else 1.0
    return found


def with_rates(optimizer: Optimizer, rates: Mapping[nn.Parameter, float]) -> Optimizer:
    """The optimizer, each of its groups divided by how much of its learning rate a parameter has (1 where not given).

    The groups are new, so that schedules must be made after this.
    """
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            parts.setdefault(rates.get(parameter, 1.0), []).append(parameter)
        ordered = sorted(parts.items(), key=lambda part: part[0] != 1.0)  # the first group's rate is what is logged
        groups += [{**group, "params": found, "lr": group["lr"] * rate} for rate, found in ordered]
    optimizer.param_groups = groups
    return optimizer


class LoraFAOptimizer(AdamW):
    """AdamW in which some parameters have a gradient in place of their own: B's, with its A and s."""

    def __init__(self, params: Any, pairs: list[LoraAdapter], **settings: Any) -> None:
        super().__init__(params, **settings)
        self.pairs = pairs

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        own = [(adapter.B, adapter.B.grad) for adapter in self.pairs]
        for adapter in self.pairs:
            if adapter.B.grad is not None:
                adapter.B.grad = projected(adapter)
        super().step()
        for parameter, gradient in own:
            parameter.grad = gradient
        return loss


def projected(adapter: LoraAdapter) -> Tensor:
    """g_B (A A^T)^-1 / s^2, of the shape of B."""
    gradient = adapter.B.grad
    assert gradient is not None
    A = adapter.A.detach().flatten(1).float()
    inverse = torch.linalg.pinv(A @ A.T + DAMPING * torch.eye(len(A), device=A.device), hermitian=True)
    changed: Tensor = gradient.flatten(1).float() @ inverse / adapter.scale**2
    return changed.view_as(gradient).to(gradient)


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """Freeze A of the LoRA that trains, and an AdamW of the rest with LoRA-FA's gradient of B.

    Args:
        r, lora_alpha, use_rslora: the adapter's own; s is taken from each layer.
    Raises:
        ConfigError: no LoRA trains; one with other settings; or one that is not y = W x + s B A x at one place.
    """
    found = _trained(model)
    if not found:
        raise ConfigError("LoRA-FA trains LoRA's B, and none trains here. Attach a LoraConfig first.")
    own = trunk(model)
    for config in (own.configs[name] for name in own.active.names):
        if isinstance(config, LoraConfig):
            for setting, said in {"r": r, "lora_alpha": lora_alpha, "use_rslora": use_rslora}.items():
                if said is not None and said != (there := getattr(config, setting)):
                    raise ConfigError(f"{setting}={said!r}, but the adapter has {there!r}.")
    pairs = [adapter for adapter in found if isinstance(adapter, LoraAdapter) and _is_plain(adapter)]
    if len(pairs) < len(found):
        raise ConfigError("LoRA-FA's gradient is that of a plain product B A with A at random: not of DoRA, of an "
                          "embedding, where A starts at zero, of a grouped convolution, or of experts. Leave those "
                          "out, or use a plain optimizer.")  # fmt: skip
    for adapter in pairs:
        adapter.A.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return LoraFAOptimizer(trained, pairs, lr=lr, weight_decay=weight_decay, eps=1e-6)


def _is_plain(adapter: LoraAdapter) -> bool:
    return adapter.magnitude is None and not adapter.embeds and adapter.B.shape[1] == len(adapter.A)


def _trained(model: nn.Module) -> list[LoraAdapter | Pair]:
    found = [module for module in model.modules() if isinstance(module, LoraAdapter | Pair)]
    return [adapter for adapter in found if adapter.B.requires_grad]
