"""What a user's model gains: the `PeftModel` mixin, and `get_peft_model`, which puts it there."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from torch import Tensor, nn

from . import arithmetic, attach, checkpoint, files, hf_format, learning, merge, sites, swap, weights
from .adapter import PeftConfig
from .attach import trunk
from .errors import AdapterError, CheckpointError
from .methods.union import UnionConfig
from .routing import Routed

Model = TypeVar("Model", bound=nn.Module)


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig | list[PeftConfig],
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
) -> "PeftModel":
    """Attach a new adapter to the model, freeze the rest, and return the same object, now also a `PeftModel`.

    Args:
        peft_config: what to attach; of a list the union, as one adapter.
        autocast_adapter_dtype: keep the adapter's weights in float32 on a half-precision base (recommended).
        revision: of the base model, for the record that is saved.
    Raises:
        AdapterError: the model has adapters already (use `add_adapter`).
        ConfigError, TargetError: the config means nothing in this model. The model is untouched then.
    """
    if isinstance(model, PeftModel):
        raise AdapterError(f"{type(model).__name__} has adapters already. Use model.add_adapter(name, config).")
    peft_config = _one(peft_config)
    if revision is not None:
        peft_config = peft_config.model_copy(update={"revision": revision})
    _attach_new(model, adapter_name, peft_config, autocast_adapter_dtype)
    assert isinstance(model, PeftModel)
    attach.activate(model, [adapter_name])
    return model


def _one(config: PeftConfig | list[PeftConfig]) -> PeftConfig:
    return UnionConfig(methods=config) if isinstance(config, list) else config


def _attach_new(model: nn.Module, name: str, config: PeftConfig, float32: bool) -> None:
    made = attach.plan(model, _named(config, model), name)
    if not float32:
        modules = dict(model.named_modules())
        for path, adapter in made.adapters.items():
            adapter.to(weights.compute_dtype(modules[path]))
    attach.install(model, made)
    _become_peft_model(model)


def _named(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """The config with the base model's name, or without a task its class, on record."""
    update: dict[str, Any] = {}
    if config.base_model_name_or_path is None:
        update["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    if config.task_type is None and config.auto_mapping is None:
        cls = swap.lineage(type(model))[1]
        update["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return config.model_copy(update=update)


def _become_peft_model(model: nn.Module) -> None:
    if not isinstance(model, PeftModel):
        swap.swap_in(model, PeftModel)
    learning.listen(model)


@dataclass(frozen=True)
class AdapterStatus:
    """One loaded adapter."""

    name: str
    peft_type: str
    parameters: int
    bytes: int  # of its parameters and buffers
    active: bool
    merged: bool
    requires_grad: bool


@dataclass(frozen=True)
class LayerStatus:
    """The state of one site, with HF PEFT's field names."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool]
    available_adapters: list[str]
    devices: dict[str, list[str]]


class PeftModel(Routed):
    """Mixed into the class of a model with adapters; names and arguments are HF PEFT's.

    It is never instantiated: `get_peft_model` and `PeftModel.from_pretrained` change the class of your model, which
    stays the object, the class and the parameters that it was.
    """

    _hf_peft_config_loaded = True  # transformers.Trainer asks this before it trains on a quantized base

    @classmethod
    def namespace(cls, original: type[nn.Module]) -> dict[str, Any]:
        """`type(model).from_pretrained` stays the original's, which loads base models."""
        own = {"from_pretrained": original.from_pretrained} if hasattr(original, "from_pretrained") else {}
        return own | super().namespace(original)

    def train(self, mode: bool = True) -> Self:
        """As any module's. Where all parts are in this mode none is set anew: trainers ask in every step."""
        return self if all(part.training is mode for part in self.modules()) else super().train(mode)

    @classmethod
    def from_pretrained(
        cls,
        model: Model,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        subfolder: str = "",
    ) -> "PeftModel":
        """Attach the adapter saved in the folder (or hub repository) `model_id` and let it act.

        Raises:
            AdapterError: the name is taken.
            CheckpointError: no adapter there, or one that does not fit this model. The model is untouched then.
        """
        if isinstance(model, PeftModel):
            raise AdapterError(f"{type(model).__name__} has adapters already. Use model.load_adapter(folder, name).")
        _load(model, model_id, adapter_name, is_trainable, config, revision, subfolder)
        assert isinstance(model, PeftModel)
        attach.activate(model, [adapter_name])
        return model

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        subfolder: str = "",
    ) -> None:
        """Attach one more saved adapter; it acts after `set_adapter`. Raises as `from_pretrained` does."""
        _load(self, model_id, adapter_name, is_trainable, config, revision, subfolder)

    def hotswap_adapter(
        self, model_id: str | Path, adapter_name: str = "default", revision: str | None = None, subfolder: str = ""
    ) -> None:
        """Put the weights of a saved adapter in the place of a loaded one's, which goes on under its name and config.

        Nothing is attached, and no compiled graph is made anew. A LoRA of a lower rank is filled up with zeros, and
        another scale is worked into B. (HF PEFT compiles anew for these unless the model was prepared.)

        Raises:
            AdapterError: an unknown name, or merged adapters.
            CheckpointError: no adapter there, or one that acts at other modules or otherwise. Nothing is changed then.
        """
        checkpoint.hotswap(self, files.locate(model_id, revision, subfolder), adapter_name)

    def save_pretrained(
        self,
        save_directory: str | Path,
        selected_adapters: list[str] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        safe_serialization: bool = True,
    ) -> None:
        """Write the adapters: "default" to the folder itself, others to folders of their names in it.

        Args:
            selected_adapters: which ones; all by default.
            state_dict: the model's, where it was gathered from shards.
            is_main_process: only then anything is written.
        Raises:
            AdapterError, CheckpointError: an unknown name, or a folder or format that cannot be; nothing is written.
        """
        if not safe_serialization:
            raise CheckpointError("Adapters are saved as safetensors only: a pickle can run any code when it is read.")
        there = trunk(self).configs
        names = list(there) if selected_adapters is None else selected_adapters
        attach.check_known(trunk(self), names)
        for name in names:
            folder = Path(save_directory) / ("" if name == "default" else name)
            checkpoint.save(self, folder, name, state_dict, is_main_process)

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The config of each loaded adapter."""
        return trunk(self).configs

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that act, in their order."""
        return list(trunk(self).active.names)

    @property
    def active_adapter(self) -> str:
        """The name of the one adapter that acts."""
        names = self.active_adapters
        if len(names) != 1:
            raise AdapterError(f"{len(names)} adapters are active: {names}. Ask active_adapters.")
        return names[0]

    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig | list[PeftConfig], autocast_adapter_dtype: bool = True
    ) -> None:
        """Attach one more new adapter; it acts and trains after `set_adapter`. Raises as `get_peft_model` does."""
        _attach_new(self, adapter_name, _one(peft_config), autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Let this adapter act and train, or several, each on top of the one before.

        Raises:
            AdapterError: an unknown name, or adapters that cannot act together.
        """
        attach.activate(self, [adapter_name] if isinstance(adapter_name, str) else list(adapter_name))

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the first that is left becomes active."""
        was_active = self.active_adapters
        attach.delete(self, adapter_name)
        left = list(self.peft_config)
        if was_active == [adapter_name] and left:
            warnings.warn(f"{adapter_name!r} was active; now {left[0]!r} is.", stacklevel=2)
            attach.activate(self, left[:1])

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> dict[str, float]:
        """Add an adapter that is a weighted sum of others, or what TIES, DARE or pruning make of them (arithmetic.py).

        They may be of any rank, at any modules and of any methods that can be merged, with weights of any sign. Those
        of one method that trains values of the base or factors of its features (BitFit, LayerNorm tuning, tokens, IA3)
        give one of their own kind, all others a LoRA. Biases and tokens beside them are combined in the same way. The
        base of a module in modules_to_save may be random, as that of a new head: it becomes the mean by weight. The
        result does not act yet; it is saved, trained on and merged as any other adapter.

        Names and arguments are HF PEFT's. Where it computes otherwise: its default is an SVD cut to the largest rank,
        here it is the exact sum. Its "linear", "ties", "dare_*" and "magnitude_prune" mix A with A and B with B, which
        is far from what they say of weights; here they are of the weights, at the rank that this takes. Its "cat" is
        wrong under use_rslora. Its TIES elects signs before weights are applied, here after, so that w = -1 is the
        change the other way round. It passes over a name that exists already, and over settings of no use.

        Args:
            combination_type: "linear" or "cat", the exact sum; "ties", "dare_linear", "dare_ties", "magnitude_prune";
                or "svd", the sum, and "ties_svd" and so on, cut to svd_rank singular values at each module.
            svd_rank: by default the largest of the adapters' ranks.
            svd_clamp: limit the entries of both factors to this quantile of theirs.
            svd_full_matrices, svd_driver: torch.linalg.svd's; they change the time that it takes.
            density: the share of the entries that "ties", "dare_*" and "magnitude_prune" keep; 0.2 by default.
            majority_sign_method: TIES elects the sign of the sum, "total", or that of most, "frequency".
        Returns:
            By module name the share of the change's energy (squared singular values) that is kept: 1 unless cut.
        Raises:
            AdapterError: an unknown name, one that exists already, or merged adapters.
            ConfigError: settings that are wrong, or of no use to this combination_type.
            MergeError: adapters that do not act on weights, or not on the same in a way that has a sum.
        """
        return arithmetic.combine(
            self, adapters, weights, adapter_name, combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver,
            density, majority_sign_method,
        )  # fmt: skip

    def convert_to_lora(
        self, rank: int | float, adapter_name: str = "default", lora_name: str = "lora"
    ) -> dict[str, float]:
        """Add a LoRA that does to weights what an adapter does to them, as far as its rank allows.

        HF PEFT's function of this name returns a config and tensors; here they are an adapter of the model, which
        `save_pretrained` writes. Biases, tokens and trained copies come along, and any mergeable method does.

        Args:
            rank: the rank at every module, or as a float the share of the energy to keep: each module gets the lowest
                rank that does; 1.0 keeps all.
            adapter_name: the adapter. It stays as it is.
            lora_name: the new one. It does not act yet.
        Returns:
            By module name the share of the change's energy (squared singular values) that is kept.
        Raises:
            AdapterError, ConfigError, MergeError: as `add_weighted_adapter` does.
        """
        return arithmetic.convert(self, rank, adapter_name, lora_name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model's own outputs inside the `with` block, also while adapters are merged."""
        with merge.unmerged(self), attach.disabled(self):
            yield

    def disable_adapters(self) -> None:
        """As `disable_adapter`, but until `enable_adapters`. Refused while adapters are merged."""
        own = trunk(self)
        names = own.active.names
        attach.activate(self, [])
        own.resting = names or own.resting

    def enable_adapters(self) -> None:
        """Let those adapters act and train again that acted before `disable_adapters`."""
        own = trunk(self)
        if not own.active.names:
            attach.activate(self, [name for name in own.resting if name in own.configs])

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What is saved of an adapter (the active one by default), under names without HF PEFT's prefix."""
        own, name = trunk(self), self.active_adapter if adapter_name is None else adapter_name
        attach.check_known(own, [name])
        config = own.configs[name]
        saved = hf_format.state(config, own.adapters(name), state_dict, name)
        return {key.removeprefix(config.hf_root): value for key, value in saved.items()}

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters (the active ones by default) into the base's weights until `unmerge_adapter`."""
        merge.merge(self, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the base's weights back, bit for bit."""
        merge.unmerge(self)

    def merge_and_unload(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> nn.Module:
        """Fold adapters in for good and remove them: the plain model with new weights (the same object)."""
        merge.merge_and_detach(self, adapter_names, safe_merge)
        learning.stop(self)
        swap.swap_out(self, PeftModel)
        return self

    def unload(self) -> nn.Module:
        """Remove all adapters: the plain model as it was, bit for bit (the same object)."""
        if trunk(self).active.merged:
            merge.unmerge(self)
        attach.detach(self)
        learning.stop(self)
        swap.swap_out(self, PeftModel)
        return self

    def get_base_model(self) -> nn.Module:
        """This very object: adapters live inside the base model, there is no wrapper to take off."""
        return self

    def penalty(self) -> Tensor | None:
        """What the adapters in training add to the loss, for loops that compute it themselves; None mostly.

        A loss that the model returns contains it already, in training mode.
        """
        found = learning.listener(self)
        return found.penalty() if found else None

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable parameters and of all parameters, adapters included."""
        return attach.counts(self)

    def print_trainable_parameters(self) -> None:
        trainable, total = attach.counts(self)
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def adapters(self) -> list[AdapterStatus]:
        """What is loaded: method, size and state of each adapter. What sites share counts once."""
        own = trunk(self)
        return [_adapter_status(own, name) for name in own.configs]

    def get_layer_status(self) -> list[LayerStatus]:
        """The state of every site: which adapters it has, which act, which train, where they lie."""
        own = trunk(self)
        return [_status(own, path, site) for path, site in own.sites.items()]


def _load(
    model: nn.Module,
    model_id: str | Path,
    name: str,
    is_trainable: bool,
    config: PeftConfig | None,
    revision: str | None,
    subfolder: str,
) -> None:
    folder = files.locate(model_id, revision, subfolder)
    if config is None:
        config = PeftConfig.from_pretrained(folder)
    config = config.model_copy(update={"inference_mode": not is_trainable})
    checkpoint.load(model, folder, name, config)
    _become_peft_model(model)


def _status(own: attach.Trunk, path: str, site: sites.AnySite) -> LayerStatus:
    here = {name: list(adapter.parameters()) for name, adapter in sites.adapters(site).items()}
    return LayerStatus(
        name=path,
        module_type=type(site).__name__,
        enabled=bool(own.active.names),
        active_adapters=[name for name in own.active.names if name in here],
        merged_adapters=[name for name in own.active.merged if name in here],
        requires_grad={name: any(parameter.requires_grad for parameter in found) for name, found in here.items()},
        available_adapters=sorted(here),
        devices={name: sorted({parameter.device.type for parameter in found}) for name, found in here.items()},
    )


def _adapter_status(own: attach.Trunk, name: str) -> AdapterStatus:
    modules = nn.ModuleList(own.adapters(name).values())
    parameters = list(modules.parameters())
    return AdapterStatus(
        name=name,
        peft_type=own.configs[name].peft_type,
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(value.nbytes for value in (*parameters, *modules.buffers())),
        active=name in own.active.names,
        merged=name in own.active.merged,
        requires_grad=any(parameter.requires_grad for parameter in parameters),
    )
