"""Sums of adapters and their like, and what any adapter does to weights as a LoRA.

To a site's weight W an adapter adds D = merged(W) - W, (out, in * kernel), and so to its bias: a task vector (Ilharco
et al. 2022, arXiv 2212.04089). With factors w_i of any sign, adapters are combined to

    linear             sum_i w_i D_i
    magnitude_prune    sum_i w_i top(D_i),     top: the largest entries stay, a share `density` of them; others are 0
    dare_linear        sum_i w_i drop(D_i),    drop: entries drawn with probability `density` stay, divided by it
    ties               of w_i top(D_i) the mean, entry by entry, over those i that have the elected sign
    dare_ties          of w_i drop(D_i) likewise

(DARE: Yu et al. 2023, arXiv 2311.03099; TIES: Yadav et al. 2023, arXiv 2306.01708.) The elected sign is that of the sum
over i, as in the paper, or with "frequency" that of most; without one the entry is 0. The result is a LoRA. A sum of
LoRAs needs no decomposition for that:

    sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...]

What is not of low rank gets the lowest rank that holds it, or is cut to its largest singular values. Methods that
train values of the base (biases, norms, tokens), or factors (IA3), change weights linearly in their own values v: there
D_i is v_i - v_0, with v_0 what changes nothing, and the result is of the same method.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import attach, weights
from .adapter import Adapter, PeftConfig, TrainedCopy, Union
from .attach import trunk
from .errors import ConfigError, MergeError, did_you_mean
from .methods.bitfit import BiasAdapter, has_bias
from .methods.lora import LoraAdapter, LoraConfig
from .methods.trainable_tokens import TokensAdapter
from .targets import compact, pattern_name

KINDS = ("linear", "magnitude_prune", "dare_linear", "ties", "dare_ties")
DENSITY = 0.2  # by default, as in TIES' paper
TYPES = ("cat", "svd", *KINDS, *(f"{kind}_svd" for kind in KINDS[1:]))


@dataclass(frozen=True)
class Rule:
    """How tensors of one shape, the changes of several adapters, become one."""

    kind: str = "linear"
    density: float = 1.0
    majority_sign_method: str = "total"

    def __call__(self, changes: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
        terms = torch.stack([w * self._pruned(D) for w, D in zip(factors, changes, strict=True)])
        if not self.kind.endswith("ties"):
            return terms.sum(0)
        votes = terms if self.majority_sign_method == "total" else terms.sign()
        agree = (terms.sign() == votes.sum(0).sign()) & (terms != 0)
        return (terms * agree).sum(0) / agree.sum(0).clamp(min=1)

    def _pruned(self, D: Tensor) -> Tensor:
        if self.kind == "linear":
            return D
        if self.kind.startswith("dare"):
            return D * torch.bernoulli(torch.full_like(D, self.density)) / self.density
        largest = D.abs().flatten().topk(int(self.density * D.numel())).indices
        return D * torch.zeros_like(D).flatten().index_fill(0, largest, 1).view_as(D)


@dataclass(frozen=True)
class Cut:
    """What is kept of a product of B (out, n) and A (n, in): all (rank=None), `rank` singular values, or as many as
    hold that share of the energy, the sum of their squares (a float)."""

    rank: int | float | None = None
    clamp: float | None = None
    full_matrices: bool = True
    driver: str | None = None

    def __call__(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, float]:
        """B and A of a lower rank, and the share of the energy that they keep."""
        most = min(len(B), A.shape[1])
        if self.rank is None and len(A) < most:
            return B, A, 1.0
        left, R = torch.linalg.qr(B)
        right, L = torch.linalg.qr(A.T)
        U, S, Vh = torch.linalg.svd(R @ L.T, full_matrices=self.full_matrices, driver=self.driver)
        energy = S.double().square().cumsum(0)
        if self.rank is None:
            noise = S[0] * max(len(B), A.shape[1]) * torch.finfo(S.dtype).eps  # as in torch.linalg.matrix_rank
            r = int(S.gt(noise).sum())
        elif isinstance(self.rank, float):
            r = int((energy < self.rank * energy[-1]).sum()) + 1
        else:
            r = self.rank
        r = max(1, min(r, len(S)))
        B, A = left @ (U[:, :r] * S[:r]), Vh[:r] @ right.T
        if self.clamp is not None:
            limit = torch.cat([B.flatten(), A.flatten()]).quantile(self.clamp)
            B, A = B.clamp(-limit, limit), A.clamp(-limit, limit)
        return B, A, float(energy[r - 1] / energy[-1]) if energy[-1] else 1.0


@dataclass(frozen=True)
class Source:
    """One of the adapters that are combined."""

    name: str
    factor: float
    config: PeftConfig
    adapters: dict[str, Adapter]  # by module name


Here = list[tuple[float, Adapter]]  # what the sources have at one site, and their factors


def combine(
    model: nn.Module,
    adapters: Sequence[str],
    factors: Sequence[float],
    name: str,
    combination_type: str,
    svd_rank: int | None,
    svd_clamp: float | None,
    svd_full_matrices: bool,
    svd_driver: str | None,
    density: float | None,
    majority_sign_method: str,
) -> dict[str, float]:
    """`PeftModel.add_weighted_adapter`, which says all of it."""
    if combination_type not in TYPES:
        raise ConfigError(f"combination_type={combination_type!r} is unknown.{did_you_mean(combination_type, TYPES)}")
    kind = "linear" if combination_type in ("cat", "svd") else combination_type.removesuffix("_svd")
    cuts, prunes, elects = combination_type.endswith("svd"), kind != "linear", kind.endswith("ties")
    useless = {"density": density is not None and not prunes, "svd_rank": svd_rank is not None and not cuts,
               "svd_clamp": svd_clamp is not None and not cuts, "svd_driver": svd_driver is not None and not cuts,
               "majority_sign_method": majority_sign_method != "total" and not elects}  # fmt: skip
    for setting in (setting for setting, given in useless.items() if given):
        raise ConfigError(f"{setting} is of no use to combination_type={combination_type!r}. Leave it out.")
    if majority_sign_method not in ("total", "frequency"):
        raise ConfigError(f"majority_sign_method={majority_sign_method!r} is unknown: take 'total' or 'frequency'.")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density={density!r}: {combination_type} keeps that share of the entries, above 0, up to 1.")
    if svd_rank is not None and svd_rank < 1:
        raise ConfigError(f"svd_rank={svd_rank!r} is no rank: the lowest is 1.")
    if svd_clamp is not None and not 0 < svd_clamp <= 1:
        raise ConfigError(f"svd_clamp={svd_clamp!r} is no quantile: give one above 0, up to 1.")
    if not adapters or len(adapters) != len(factors) or not all(map(math.isfinite, factors)):
        raise ConfigError(f"Each adapter needs a finite weight: adapters={list(adapters)}, weights={list(factors)}.")
    given = list(zip(adapters, factors, strict=True))
    if not prunes:  # an adapter that is given twice needs no rank of its own
        given = [(one, sum(w for other, w in given if other == one)) for one in dict.fromkeys(adapters)]
    sources = _sources(model, name, given)
    rule = Rule(kind, density or DENSITY, majority_sign_method)
    if not cuts and all(_is_linear(model, source) for source in sources):
        return _add_values(model, name, sources, rule)
    cut = Cut(svd_rank or _largest_rank(sources), svd_clamp, svd_full_matrices, svd_driver) if cuts else Cut()
    return _add_lora(model, name, sources, rule, cut)


def convert(model: nn.Module, rank: int | float, adapter: str, name: str) -> dict[str, float]:
    """`PeftModel.convert_to_lora`, which says all of it."""
    if not (0 < rank <= 1 if isinstance(rank, float) else rank >= 1):
        raise ConfigError(f"rank={rank!r}: give a rank, from 1 on, or a share of the energy, above 0.0, up to 1.0.")
    return _add_lora(model, name, _sources(model, name, [(adapter, 1.0)]), Rule(), Cut(rank))


def _sources(model: nn.Module, name: str, given: Sequence[tuple[str, float]]) -> list[Source]:
    own = trunk(model)
    attach.check_name(model, name)
    attach.check_unmerged(own)
    attach.check_known(own, [adapter for adapter, _ in given])
    return [Source(adapter, w, own.configs[adapter], own.adapters(adapter)) for adapter, w in given]


def _by_path(sources: Sequence[Source]) -> dict[str, Here]:
    found: dict[str, Here] = {}
    for source in sources:
        for path, adapter in source.adapters.items():
            found.setdefault(path, []).append((source.factor, adapter))
    return found


def _parts(here: Here) -> list[Adapter]:
    return [part for _, adapter in here for part in adapter.parts()]


# --------------------------------------------------------------------------------------- in the adapters' own values


def _is_linear(model: nn.Module, source: Source) -> bool:
    """Whether all that the adapter does is linear in its own values."""
    modules = dict(model.named_modules())
    return all(
        not isinstance(adapter, Union) and adapter.neutral(modules[path]).keys() == _floats(adapter).keys()
        for path, adapter in source.adapters.items()
    )


def _floats(adapter: Adapter) -> dict[str, Tensor]:
    return {entry: value for entry, value in adapter.state_dict().items() if value.is_floating_point()}


def _add_values(model: nn.Module, name: str, sources: Sequence[Source], rule: Rule) -> dict[str, float]:
    first = sources[0]
    for other in sources[1:]:
        paths = first.adapters.keys() ^ other.adapters.keys()
        if type(other.config) is not type(first.config) or paths:
            which = f"{min(paths)} has one only" if paths else f"{first.config.peft_type}, {other.config.peft_type}"
            raise MergeError(f"{first.name!r} and {other.name!r} are not of one method at the same modules: {which}. "
                             "Make each a LoRA with convert_to_lora, and combine these.")  # fmt: skip
    made = attach.plan(model, first.config.model_copy(update={"inference_mode": False}), name)
    modules = dict(model.named_modules())
    for path, here in _by_path(sources).items():
        _set_values(path, modules[path], made.adapters[path], here, rule, path.endswith(_saved(sources)))
    attach.install(model, made)
    return dict.fromkeys(made.adapters, 1.0)


def _saved(sources: Sequence[Source]) -> tuple[str, ...]:
    """What modules_to_save names; as there, names are meant by their ends."""
    saved = (getattr(source.config, "modules_to_save", None) or [] for source in sources)
    return tuple(dict.fromkeys(entry for entries in saved for entry in entries))


@torch.no_grad()
def _set_values(path: str, site: nn.Module, new: Adapter, here: Here, rule: Rule, mean: bool) -> None:
    """mean: the values that change nothing may be random ones, as those of a new head."""
    factors = [w for w, _ in here]
    total = sum(factors)
    if mean and total <= 0:
        raise MergeError(f"{path} is among modules_to_save, of which there is only a mean by weight, and the weights "
                         f"add up to {total:g}. Give weights with a sum above 0.")  # fmt: skip
    if not (neutral := new.neutral(site)):
        return  # the values are those of a tied site
    for part in _parts(here):
        if difference := new.differs(part):
            raise MergeError(f"{path or type(site).__name__}: the adapters differ in {difference}. Make each a LoRA "
                             "with convert_to_lora, and combine these.")  # fmt: skip
    state = new.state_dict()
    for entry, zero in neutral.items():
        zero = zero.to(state[entry].dtype)
        changes = [sum(part.state_dict()[entry] - zero for part in adapter.parts()) for _, adapter in here]
        state[entry] = zero + (Rule()(changes, [w / total for w in factors]) if mean else rule(changes, factors))
    new.load_state_dict(state, assign=True)


# ---------------------------------------------------------------------------------------------------------- as a LoRA


def _largest_rank(sources: Sequence[Source]) -> int:
    largest = 0
    for source in sources:
        ranks = [part.rank[0] for adapter in source.adapters.values() for part in adapter.parts() if part.rank]
        if not ranks:
            raise ConfigError(f"svd_rank=None takes the largest rank of the adapters, and {source.name!r} "
                              f"({source.config.peft_type}) has none. Give one.")  # fmt: skip
        largest = max(largest, *ranks)
    return largest


@torch.no_grad()
def _add_lora(model: nn.Module, name: str, sources: Sequence[Source], rule: Rule, cut: Cut) -> dict[str, float]:
    modules, here = dict(model.named_modules()), _by_path(sources)
    others = {path for path, found in here.items() if _of_one_kind(_parts(found))}
    if not (targets := [path for path in here if path not in others]):
        raise MergeError(f"Of what {[source.name for source in sources]} train (biases, tokens, whole modules) nothing "
                         "can be A and B of a LoRA. Combine adapters of one such method without svd.")  # fmt: skip
    whole = tuple(path for path, found in here.items() if any(part.replacement is not None for part in _parts(found)))
    inside = tuple(f"{path}." for path in whole)
    if both := [path for path in here if path.startswith(inside) or (path in whole and path in targets)]:
        raise MergeError(f"{both[0]} is trained whole by one of the adapters, and another changes its weights: they "
                         "have no sum.")  # fmt: skip
    made = {path: _lora_of(path, modules[path], here[path], rule, cut) for path in targets}
    config = _config(model, sources, made, {path: _parts(here[path])[0] for path in others})
    with torch.device("meta"):
        planned = attach.plan(model, config, name)
    for path, new in planned.adapters.items():
        if isinstance(new, LoraAdapter):
            new.take(made[path].B, made[path].A, made[path].shift)
        elif path in here:
            _set_values(path, modules[path], new, here[path], rule, path.endswith(_saved(sources)))
    attach.install(model, planned)
    return {path: found.kept for path, found in made.items()}


def _of_one_kind(parts: Sequence[Adapter]) -> bool:
    """Whether a LoRA has what all of these are beside A and B: a bias, tokens, a trained copy."""
    return any(all(isinstance(part, kind) for part in parts) for kind in (BiasAdapter, TokensAdapter, TrainedCopy))


@dataclass(frozen=True)
class Change:
    """What is added at a site: B (out, n) times A (n, in * kernel) to the weight, and a shift (out,) to the bias."""

    B: Tensor
    A: Tensor
    kept: float  # share of the energy
    shift: Tensor | None


def _lora_of(path: str, site: nn.Module, here: Here, rule: Rule, cut: Cut) -> Change:
    shape, factors = weights.layout(site), [w for w, _ in here]
    try:
        if shape is None:
            for part in _parts(here):
                part.merged(site, torch.empty(0))  # says why not, where it cannot
            raise MergeError(f"{type(site).__name__} has no weight (out, in), of which a LoRA could be a change.")
        if shape.groups > 1:
            raise MergeError("A grouped convolution sees its own share of the channels; LoRA's A sees all of them.")
        pairs = [_change(site, adapter) for _, adapter in here]
        if rule.kind == "linear":
            B = torch.cat([w * B for w, (B, _) in zip(factors, pairs, strict=True)], 1)
            A = torch.cat([A for _, A in pairs])
        else:
            B, A = _as_pair(rule([B @ A for B, A in pairs], factors))
        shift = _shift(site, site._parameters.get(shape.bias), here, rule)
        if shift is not None and not has_bias(site):
            raise MergeError(f"its {shape.bias} is changed, which a LoRA does not train.")
    except MergeError as error:
        raise MergeError(f"{path or type(site).__name__}: {error}") from None
    return Change(*cut(B, A), shift)


def _change(site: nn.Module, adapter: Adapter) -> tuple[Tensor, Tensor]:
    parts = adapter.parts()
    if len(parts) == 1 and (exact := parts[0].low_rank(site)) is not None:
        return exact
    before = after = weights.read(site).double()  # or the difference would be as coarse as the weight is large
    for part in parts:
        after = part.merged(site, after)
    return _as_pair((after - before).flatten(1).to(weights.master_dtype(weights.compute_dtype(site))))


def _as_pair(D: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.eye(min(D.shape), dtype=D.dtype, device=D.device)
    return (one, D) if len(D) < D.shape[1] else (D, one)


def _shift(site: nn.Module, bias: Tensor | None, here: Here, rule: Rule) -> Tensor | None:
    if bias is None:
        return None
    shifts, before = [], bias.double()
    for _, adapter in here:
        after: Tensor | None = before
        for part in adapter.parts():
            after = part.merged_bias(site, after)
        assert after is not None
        shifts.append((after - before).to(weights.master_dtype(bias.dtype)))
    return rule(shifts, [w for w, _ in here]) if any(shift.any() for shift in shifts) else None


def _config(
    model: nn.Module, sources: Sequence[Source], made: dict[str, Change], others: dict[str, Adapter]
) -> LoraConfig:
    """A LoRA with s = 1 and these ranks, and what else it needs. others: one adapter of each of those modules."""
    ranks: dict[str, int] = {}
    for path, change in made.items():
        key = pattern_name(path, made)
        ranks[key] = max(len(change.A), ranks.get(key, 1))
    r = Counter(ranks.values()).most_common(1)[0][0]
    pattern: dict[str, Any] = {f"^{re.escape(key)}": rank for key, rank in ranks.items() if rank != r}
    biases = any(isinstance(part, BiasAdapter) for part in others.values())
    shifts = any(change.shift is not None for change in made.values())
    saved = _saved(sources)
    copies = [path for path, part in others.items() if isinstance(part, TrainedCopy) and not path.endswith(saved)]
    held = {path: part for path, part in others.items() if isinstance(part, TokensAdapter) and part.state_dict()}
    tokens = {path: part.rows[0].ids for path, part in held.items()}
    tasks = {source.config.task_type for source in sources}
    first = sources[0].config
    return LoraConfig(
        r=r, lora_alpha=r, rank_pattern=pattern, alpha_pattern=pattern, target_modules=compact(list(made), model),
        bias="all" if biases else "lora_only" if shifts else "none", trainable_token_indices=tokens or None,
        modules_to_save=[*saved, *copies] or None, task_type=tasks.pop() if len(tasks) == 1 else None,
        auto_mapping=first.auto_mapping, base_model_name_or_path=first.base_model_name_or_path, revision=first.revision,
    )  # fmt: skip
