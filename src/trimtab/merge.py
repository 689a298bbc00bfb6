"""Fold adapters into the base's weights, and take them out again exactly.

Merging puts new parameter objects in place and keeps the old ones, so unmerging restores the very bits (adding and
subtracting a delta drifts), ties between weights, and quantized storage.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import sites, weights
from .adapter import Adapter
from .attach import Trunk, check_known, detach, trunk
from .errors import AdapterError, MergeError, warn
from .sites import AnySite

PARTS = ("_parameters", "_buffers", "_modules", "state")  # `state` is where bitsandbytes keeps 8-bit scales


class QuantizedMergeWarning(UserWarning):
    """The merged weight was quantized again, which rounds it."""


def merge(model: nn.Module, names: list[str] | None = None, safe: bool = False) -> None:
    """Fold adapters (default: the active ones) into the weights; they act from there until `unmerge`.

    Args:
        safe: refuse a merge that makes a weight infinite or NaN.
    Raises:
        AdapterError: an unknown name, or adapters that are merged already.
        MergeError: a method or a layer that cannot be folded; nothing is changed then.
    """
    own = trunk(model)
    chosen = tuple(own.active.names if names is None else names)
    check_known(own, chosen)
    if own.active.merged:
        raise AdapterError(f"{list(own.active.merged)} are merged already; call unmerge_adapter() first.")
    folded = {path: site for path, site in own.sites.items() if any(name in sites.adapters(site) for name in chosen)}
    try:
        for path, site in folded.items():
            try:
                _fold(site, chosen, safe)
            except MergeError as error:
                raise MergeError(f"{path or type(model).__name__}: {error}") from None
    except BaseException:
        _restore(own)
        raise
    _tie_again(folded.values())
    own.active.merged = chosen
    if quantized := [path for path, site in folded.items() if weights.is_quantized(site)]:
        warn(
            f"{len(quantized)} quantized weights were dequantized, merged and quantized again, which rounds: "
            "outputs differ slightly from those of the attached adapter.",
            QuantizedMergeWarning,
        )


def unmerge(model: nn.Module) -> None:
    """Put the weights back as they were, bit for bit."""
    own = trunk(model)
    _restore(own)
    own.active.merged = ()


@contextlib.contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """The base's own weights inside the block; after it the very ones that were merged, not merged anew."""
    own = trunk(model)
    names = own.active.merged
    folded = [(site, _parts(site)) for site in own.sites.values() if "_kept" in vars(site)]
    unmerge(model)
    try:
        yield
    finally:
        for site, parts in folded:
            vars(site)["_kept"] = _parts(site)
            _put(site, parts)
        own.active.merged = names


def merge_and_detach(model: nn.Module, names: list[str] | None = None, safe: bool = False) -> None:
    """Fold adapters in for good and remove them all."""
    own = trunk(model)
    if own.active.merged:
        unmerge(model)
    merge(model, names, safe)
    untied = _comes_apart(model)
    for site in own.sites.values():
        vars(site).pop("_kept", None)
    own.active.merged = ()
    detach(model)
    if untied:
        _untie(model)
    _forget_gguf(model)


def _fold(site: AnySite, names: tuple[str, ...], safe: bool) -> None:
    held = sites.adapters(site)
    there = [cast(Adapter, held[name]) for name in names if name in held]
    adapters = [part for adapter in there for part in adapter.parts()]
    vars(site)["_kept"] = _parts(site)
    replaced = [adapter for adapter in adapters if adapter.replacement is not None]
    named = [adapter for adapter in adapters if adapter.folds]
    others = [adapter for adapter in adapters if adapter.replacement is None and not adapter.folds]
    for adapter in replaced:
        trained = copy.deepcopy(adapter.replacement)
        assert trained is not None
        _put_in(site, trained.to(weights.compute_dtype(site)).requires_grad_(False))
    if named:
        weights.check_whole(site)
    shape = weights.layout(site) if others else None
    for adapter in others:
        if type(adapter).merged is Adapter.merged:  # asked here too, for sites that have no weight to ask it with
            adapter.merged(site, torch.empty(0))
    bias_name = shape.bias if shape else "bias"
    bias = site._parameters.get(bias_name)
    with torch.no_grad():
        changed = {name for adapter in named for name in adapter.folds}
        folded = {name: sites.folded_parameter(site, name, named) for name in changed}
        weight = sites.folded_weight(site, others) if shape else None
        new_bias = sites.fold_bias(site, bias, others)
    for value in (*folded.values(), weight, new_bias):
        if safe and value is not None and not value.isfinite().all():
            raise MergeError("the merged weight would not be finite. The adapter is broken; nothing was changed.")
    if weight is not None:
        weights.write(site, weight)
    if new_bias is not None and new_bias is not bias:
        folded[bias_name] = new_bias
    for name, value in folded.items():
        site._parameters[name] = nn.Parameter(value, requires_grad=False)


def _tie_again(folded: Iterable[AnySite]) -> None:
    """Let weights that were one parameter before be one again where the same was folded into them."""
    merged: dict[int, nn.Parameter] = {}
    for site in folded:
        for name, before in vars(site)["_kept"]["_parameters"].items():
            now = site._parameters.get(name)
            if before is None or now is None or now is before:
                continue
            first = merged.setdefault(id(before), now)
            if first is not now and first.shape == now.shape and torch.equal(first, now):
                site._parameters[name] = first


def _parts(site: nn.Module) -> dict[str, Any]:
    """What folding changes, as it is now."""
    parts = {part: vars(site)[part] for part in PARTS if part in vars(site)}
    return {part: dict(value) if isinstance(value, dict) else value for part, value in parts.items()}


def _put_in(site: nn.Module, trained: nn.Module) -> None:
    """Let the site hold the trained copy's parameters and sub-modules instead of its own."""
    for part in ("_parameters", "_buffers", "_modules"):
        vars(site)[part].update(vars(trained)[part])


def _restore(own: Trunk) -> None:
    for site in own.sites.values():
        _put(site, vars(site).pop("_kept", {}))


def _put(site: nn.Module, parts: dict[str, Any]) -> None:
    for part, value in parts.items():
        if part == "_parameters":
            for name, parameter in value.items():
                _follow(parameter, site._parameters[name])
        if isinstance(value, dict):
            vars(site)[part].update(value)
        else:
            vars(site)[part] = value


def _follow(parameter: Tensor | None, merged: Tensor | None) -> None:
    """Take a kept parameter along where the model was moved or cast while it was merged."""
    if parameter is None or merged is None:
        return
    if parameter.device != merged.device:
        parameter.data = parameter.data.to(merged.device)
    if parameter.is_floating_point() and parameter.dtype != merged.dtype:
        parameter.data = parameter.data.to(merged.dtype)


def _comes_apart(model: nn.Module) -> bool:
    """Whether what was one parameter before merging is several now."""
    successors: dict[int, set[int]] = {}
    for module in model.modules():
        kept = vars(module).get("_kept", {}).get("_parameters", {})
        for name, parameter in module._parameters.items():
            if parameter is not None:
                successors.setdefault(id(kept.get(name, parameter)), set()).add(id(parameter))
    return any(len(found) > 1 for found in successors.values())


def _untie(model: nn.Module) -> None:
    """Tell a transformers model that its embeddings are two matrices now, so that both are saved."""
    config = getattr(model, "config", None)
    if config is None:
        return
    for settings in (config, config.get_text_config(decoder=True)):
        settings.tie_word_embeddings = False
    vars(model)["all_tied_weights_keys"] = {}


def _forget_gguf(model: nn.Module) -> None:
    """A model read from a GGUF file holds plain floats, but calls itself quantized and so refuses to be saved."""
    config: Any = getattr(model, "config", None)
    method = getattr(getattr(config, "quantization_config", None), "quant_method", None)
    if method == "gguf" and not any(weights.is_quantized(module) for module in model.modules()):
        del config.quantization_config
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(name, None)
