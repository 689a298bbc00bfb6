"""LoRA's starts that follow from data: EVA (Paischer et al. 2024, arXiv 2410.07170), CorDA (Yang et al. 2024, arXiv
2406.05223), LoRA-GA (Wang et al. 2024, arXiv 2407.05000); and from what quantization lost: LoftQ (Li et al. 2023, arXiv
2310.08659).

With X a site's inputs, W its weight, G the gradient of the loss to it, Q the quantized weight, r the rank:

    EVA       A0 = the r principal components of X, B0 = 0; r is shared out by the variance that they explain
    CorDA     W C = U S V^T with C = X^T X / n;  s B0 A0 = U_r S_r V_r^T C^-1, the largest r (ipm) or the smallest (kpm)
    LoRA-GA   G = U S V^T;  A0, B0 are other singular vectors of 2r each, B0 times S and a scale
    LoftQ     s B0 A0 = the r largest parts of W - Q

CorDA and LoRA-GA start elsewhere than at zero: y = W x + s (B A - B0 A0) x. A0 and B0 cannot be computed again without
the data, so such an adapter is saved as [A; A0] and [B, -B0], an ordinary LoRA of twice the rank.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .. import attach, weights
from ..errors import AdapterError, ConfigError
from ..targets import compact, is_linear, pattern_value
from .lora import LoraAdapter, LoraConfig
from .lora_init import CordaConfig, EvaConfig, LoraGAConfig

Pair = tuple[Tensor, Tensor]


# EVA


def initialize_lora_eva_weights(
    model: nn.Module, dataloader: Iterable[Mapping[str, Tensor]], adapter_name: str = "default"
) -> None:
    """Start an untrained adapter with init_lora_weights="eva" by the data: its A, and the ranks of its sites.

    One pass over the data, which ends early when all components are found (EvaConfig.tau).

    Raises:
        AdapterError, ConfigError: no such adapter, or data too few for its ranks.
    """
    own = attach.trunk(model)
    config = cast(LoraConfig, own.configs.get(adapter_name))
    if config is None or getattr(config, "init_lora_weights", None) != "eva":
        raise AdapterError(f"{adapter_name!r} is no adapter with init_lora_weights='eva'.")
    settings = config.eva_config or EvaConfig.model_validate({})
    sites = {path: own.sites[path] for path in own.adapters(adapter_name) if path in config.find(model)}
    ranks = {path: pattern_value(config.rank_pattern, path, config.r) for path in sites}
    most = {path: min(round(r * settings.rho), *_size(sites[path])) for path, r in ranks.items()}
    with attach.disabled(model):
        found = _components(model, dataloader, sites, most, settings)
    kept = _shared_out({path: ratio for path, (_, ratio) in found.items()}, sum(ranks.values()))
    chosen = {path: r for path, r in kept.items() if r}
    alphas = {path: pattern_value(config.alpha_pattern, path, config.lora_alpha) for path in sites}
    if settings.adjust_scaling_factors:
        alphas = {path: alpha * kept[path] / ranks[path] for path, alpha in alphas.items()}
    new = config.model_copy(
        update={
            "target_modules": compact(list(chosen), model),
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "rank_pattern": {path: r for path, r in chosen.items() if r != config.r},
            "alpha_pattern": {path: alphas[path] for path in chosen if alphas[path] != config.lora_alpha},
        }
    )
    active = own.active.names
    made = attach.plan(model, new, f"{adapter_name}_eva")
    for path, r in chosen.items():
        with torch.no_grad():
            cast(LoraAdapter, made.adapters[path]).A.copy_(found[path][0][:r])
    attach.delete(model, adapter_name)
    made.name = adapter_name
    attach.install(model, made)
    attach.activate(model, list(active))


def _components(
    model: nn.Module,
    data: Iterable[Mapping[str, Tensor]],
    sites: Mapping[str, nn.Module],
    most: Mapping[str, int],
    settings: EvaConfig,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each site the principal components of its inputs, (most, in), and the share of variance of each."""
    from sklearn.decomposition import IncrementalPCA

    fits: dict[str, Any] = {}
    before: dict[str, Any] = {}
    for batch in data:
        inputs = _inputs(model, sites, functools.partial(model, **_on(model, batch)))
        for group in _same(inputs):  # layers with one input have one result
            rows = _tokens(inputs[group[0]], batch, settings)
            width = max(most[path] for path in group)
            if len(rows) < width:
                continue
            fit = fits.get(group[0]) or IncrementalPCA(width)
            before[group[0]] = getattr(fit, "components_", None)
            fits |= dict.fromkeys(group, fit.partial_fit(rows.double().cpu().numpy()))
        settled = (_agree(fits[path].components_, old, settings.tau) for path, old in before.items())
        if fits.keys() == sites.keys() and all(settled):
            break
    if missing := [path for path in sites if path not in fits]:
        raise ConfigError(f"No batch has the {most[missing[0]]} tokens that the components of {missing[0]} need. Give "
                          "larger batches, or lower r or EvaConfig.rho.")  # fmt: skip
    found = {}
    for path, fit in fits.items():
        components = torch.from_numpy(fit.components_[: most[path]])
        if settings.whiten:
            components = components / torch.from_numpy(fit.singular_values_[: most[path], None]).sqrt()
        found[path] = components, torch.from_numpy(fit.explained_variance_ratio_[: most[path]])
    return found


def _agree(new: Any, old: Any, tau: float) -> bool:
    if old is None:
        return False
    pair = torch.from_numpy(new), torch.from_numpy(old)
    return bool((torch.cosine_similarity(*pair) >= tau).all())


def _same(inputs: Mapping[str, Tensor]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for path, x in inputs.items():
        groups.setdefault(id(x), []).append(path)
    return list(groups.values())


def _tokens(x: Tensor, batch: Mapping[str, Tensor], settings: EvaConfig) -> Tensor:
    """(B, ..., in) -> (n, in), of the tokens that are no padding and are learned."""
    mask = batch.get("attention_mask", torch.ones(x.shape[:-1])).bool()
    labels = batch.get("labels")
    if settings.use_label_mask and labels is not None and labels.shape == mask.shape:
        mask = mask & (labels != settings.label_mask_value)
    return x[mask.to(x.device)] if mask.shape == x.shape[:-1] else x.flatten(0, -2)


def _shared_out(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of the sites' components are among the `budget` that explain the most of their own variance."""
    everything = sorted(((share, path) for path, found in shares.items() for share in found.tolist()), reverse=True)
    kept = [path for _, path in everything[:budget]]
    return {path: kept.count(path) for path in shares}


# CorDA and LoRA-GA


@torch.no_grad()
def preprocess_corda(model: nn.Module, lora_config: LoraConfig, run_model: Callable[[], object]) -> None:
    """Find CorDA's start for this config, to be called before `get_peft_model(model, lora_config)`.

    Args:
        run_model: calls the model on samples of the data, those of the task (ipm) or of what is to be kept (kpm).
    """
    _check_kind(lora_config, "corda")
    settings = lora_config.corda_config or CordaConfig()
    for name, site, r, scale, calls in _observed(model, lora_config, run_model):
        covariances = []
        for x in calls:
            rows = x.flatten(0, -2).float()
            rows = rows / rows.max().abs()  # as HF PEFT does, so that no call outweighs the others
            covariances.append(rows.T @ rows)
        C = torch.stack(covariances).mean(0)
        lora_config.given_starts[name] = _corda(weights.read(site).float(), C, r, scale, settings)


def _corda(W: Tensor, C: Tensor, r: int, scale: float, settings: CordaConfig) -> Pair:
    damp = 0.01
    while True:  # until C can be inverted
        damped = C + torch.eye(len(C)).to(C) * C.diagonal().mean() * damp
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, torch.eye(len(C)).to(C)) < 0.05:
            break
        damp *= 2
    U, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    Vh = Vh @ inverse
    part = slice(r) if settings.corda_method == "ipm" else slice(len(S) - r, None)
    root = (S[part] / scale).sqrt()
    return root[:, None] * Vh[part], U[:, part] * root


def preprocess_loraga(model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], object]) -> None:
    """Find LoRA-GA's start for this config, to be called before `get_peft_model(model, lora_config)`.

    Args:
        train_step: runs the model and `backward` on one batch, or on several, whose gradients are averaged.
    """
    _check_kind(lora_config, "lora_ga")
    settings = lora_config.lora_ga_config or LoraGAConfig.model_validate({})
    chosen = _chosen(model, lora_config)
    for name, site in chosen.items():
        if weights.is_quantized(site):
            raise ConfigError(f"{name} is quantized: LoRA-GA asks for the gradient of its weight. Load it in full.")
    with _gradients_of(model, chosen) as counts, torch.enable_grad():
        train_step()
        for name, site in chosen.items():
            gradient = cast(Tensor, site.weight).grad
            if gradient is None:
                raise ConfigError(f"train_step gave {name} no gradient. It must run the model and loss.backward().")
            shape = weights.layout(site)
            gradient = (gradient.T if shape and shape.transposed else gradient).float() / counts[name]
            r, scale = lora_config.rank_and_scale(name)
            W = weights.read(site).detach().float()
            lora_config.given_starts[name] = _lora_ga(name, W, gradient, r, scale, settings)


def _lora_ga(name: str, W: Tensor, G: Tensor, r: int, scale: float, settings: LoraGAConfig) -> Pair:
    if 2 * r > min(G.shape):
        most = min(G.shape)
        raise ConfigError(f"{name}: LoRA-GA takes 2 r of the {most} singular vectors. Closest: r={most // 2}.")
    U, S, V = torch.svd_lowrank(G, q=min(4 * r, min(G.shape)), niter=4)
    picked = torch.randperm(2 * r)[:r] if settings.direction == "random" else torch.arange(r)
    of_A, of_B = {
        "ArBr": (2 * picked + 1, 2 * picked),
        "A2rBr": (picked + r, picked),
        "ArB2r": (picked, picked + r),
        "random": (picked, picked),
    }[settings.direction]
    A, B, S = V.T[of_A], U[:, of_B] * S[of_B], S[of_B]
    if settings.scale == "stable":
        B = B * len(W) ** 0.25 / settings.stable_gamma**0.5
    elif settings.scale == "weight_svd":
        B = B * torch.svd_lowrank(W, q=r, niter=4)[1][0] / S[0]
    elif settings.scale == "gd_scale":
        A, B = A / scale, B / scale
    return A, B


@contextmanager
def _gradients_of(model: nn.Module, sites: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Inside, the sites' weights alone gather gradients; how often each has got one. Leaves the model as it was."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    counts = dict.fromkeys(sites, 0)
    training = model.training
    with ExitStack() as stack:
        model.requires_grad_(False).train()
        for name, site in sites.items():

            def count(_: Tensor, name: str = name) -> None:
                counts[name] += 1

            weight = cast(Any, site.weight).requires_grad_(True)
            stack.callback(weight.register_post_accumulate_grad_hook(count).remove)
        try:
            yield counts
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(flags[name])
            for site in sites.values():
                cast(Tensor, site.weight).grad = None
            model.train(training)


def _check_kind(config: LoraConfig, kind: str) -> None:
    if config.init_lora_weights != kind:
        raise ConfigError(f"The config has init_lora_weights={config.init_lora_weights!r}. Closest: {kind!r}.")


def _chosen(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    found = config.resolved(model).find(model)
    for name, site in found.items():
        if not is_linear(site):
            raise ConfigError(f"{name} is a {type(site).__name__}, not a linear layer: init_lora_weights="
                              f"{config.init_lora_weights!r} decomposes matrices.")  # fmt: skip
    return found


def _observed(
    model: nn.Module, config: LoraConfig, run: Callable[[], object]
) -> Iterator[tuple[str, nn.Module, int, float, list[Tensor]]]:
    chosen = _chosen(model, config)
    calls: dict[str, list[Tensor]] = {name: [] for name in chosen}
    with ExitStack() as stack:
        for name, site in chosen.items():
            hook = site.register_forward_pre_hook(lambda _, args, name=name: calls[name].append(args[0].detach()))
            stack.callback(hook.remove)
        run()
    for name, site in chosen.items():
        if not calls[name]:
            raise ConfigError(f"run_model did not call {name}. It must run the model on some data.")
        yield name, site, *config.rank_and_scale(name), calls[name]


def _inputs(model: nn.Module, sites: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    training = model.training
    with ExitStack() as stack, torch.no_grad():
        for path, site in sites.items():
            hook = site.register_forward_pre_hook(lambda _, args, path=path: found.update({path: args[0]}))
            stack.callback(hook.remove)
        stack.callback(model.train, training)
        model.eval()
        run()
    return found


def _on(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    place = next(model.parameters()).device
    return {name: value.to(place) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _size(site: nn.Module) -> tuple[int, int]:
    shape = weights.layout(site)
    assert shape is not None
    return shape.out, shape.into


# LoftQ


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Start an untrained LoRA adapter of a quantized model at what quantization lost, layer by layer.

    Args:
        model_path: the folder of the model in full precision, in safetensors; by default where it was loaded from.
        callback: called with the model and the module's name after each layer; where it returns False, that layer
            gets its old start back.
    Raises:
        AdapterError, ConfigError: no such adapter, no quantized layer under it, or no such weights.
    """
    own = attach.trunk(peft_model)
    adapters = cast(dict[str, LoraAdapter], own.adapters(adapter_name))
    found = {path: adapter for path, adapter in adapters.items() if weights.is_quantized(own.sites[path])}
    if not found:
        raise AdapterError(f"{adapter_name!r} has no site with a quantized weight, so there is nothing to make up for.")
    full = _Weights(Path(model_path or str(getattr(peft_model, "name_or_path", ""))), peft_model)
    for path, adapter in found.items():
        quantized = weights.read(own.sites[path]).float()
        U, S, Vh = torch.linalg.svd(full.read(f"{path}.weight").to(quantized) - quantized, full_matrices=False)
        r = len(adapter.A)
        root = (S[:r] / adapter.scale).sqrt()
        before = adapter.A.clone(), adapter.B.clone()
        adapter.A.copy_(root[:, None] * Vh[:r])
        adapter.B.copy_(U[:, :r] * root)
        if callback is not None and not callback(peft_model, path):
            adapter.A.copy_(before[0])
            adapter.B.copy_(before[1])


class _Weights:
    """The tensors of a model's safetensors files, each read when it is asked for."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self.files: dict[str, Path] = {}
        folder = folder.parent if folder.suffix == ".safetensors" else folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self.files = {key: folder / name for key, name in listed.items()}
        elif (path := folder / "model.safetensors").is_file():
            with safe_open(path, "pt") as opened:
                self.files = dict.fromkeys(opened.keys(), path)
        else:
            raise ConfigError(f"{folder} holds no model.safetensors. Give model_path, the folder of the full model.")

    def read(self, key: str) -> Tensor:
        key = key if key in self.files else key.removeprefix(self.prefix)
        if key not in self.files:
            raise ConfigError(f"The full model has no {key}.")
        with safe_open(self.files[key], "pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
        return tensor
