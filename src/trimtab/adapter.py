"""The contract: what a method gives (`Adapter`, one per site) and how it is configured (`PeftConfig`).

Methods that change what goes into attention, or into the model as a whole, give an `InputAdapter`.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from . import files, weights
from .errors import CheckpointError, ConfigError, MergeError, did_you_mean
from .rows import Group, Rows


class TaskType(StrEnum):
    """HF PEFT's task names. The first three also name the heads that are trained whole (`HEADS`)."""

    SEQ_CLS = "SEQ_CLS"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    CAUSAL_LM = "CAUSAL_LM"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# A new head starts random, so a frozen one would be useless: these are added to modules_to_save.
HEADS: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


PeftConfigT = TypeVar("PeftConfigT", bound="PeftConfig")


class Adapter(nn.Module):
    """The weights of one adapter at one site, and how they act there.

    With x the site's input and f its own computation, an active adapter makes the site return

        y = after(site, x, f(before(site, x)))

    Several active adapters nest in their order: the second takes the first one's result for f. An adapter
    with a `replacement` (a trained copy of the site) has it run instead of f.
    """

    replacement: nn.Module | None
    on_input: ClassVar[bool] = False  # whether it is an `InputAdapter`
    takes_means = False  # whether it takes means over the tokens of a row
    dropout: float = 0.0  # probability; 0 where the method has none
    draws: ClassVar[bool] = False  # whether training draws other random numbers than those of dropout
    rank: tuple[int, int] | None = None  # of the change, and the highest that makes sense at the site
    folds: tuple[str, ...] = ()  # the parameters of the site that `folded` changes; then it acts by nothing else
    site: ClassVar[Any] = None  # the kind of sites.AnySite that it asks for, where it is not one of the usual ones
    ranked: str = ""  # the parameter of the site whose rank that is, where it is not the layer's weight
    adjusted: ClassVar[frozenset[str]] = frozenset()  # settings of another one that `state_of` makes up for
    hf_names: ClassVar[dict[str, str]] = {}  # our parameter name -> its key in HF PEFT's files, where they differ
    hf_wraps: int = 1  # how often HF PEFT puts the site of such an adapter into a `base_layer`
    hf_shared: ClassVar[dict[str, str]] = {}  # entry that all adapters of a model share -> its whole key there
    hf_computed: tuple[str, ...] = ()  # the ends of the keys of `computed`
    not_merged: ClassVar[str] = "it is no linear map of its input"  # the reason, where `merged` is not given

    def __init__(self) -> None:
        super().__init__()
        self.replacement = None

    def before(self, site: nn.Module, x: Any) -> Any:
        """The input the site gets. Must return new tensors, never change x in place."""
        return x

    def after(self, site: nn.Module, x: Any, y: Any) -> Any:
        """The output in place of y; x is what came in, before `before`."""
        return y

    def joins(self, site: nn.Module) -> bool:
        """Whether `after_groups` does it at this site: `before` and `replacement` are then not asked."""
        return False

    @classmethod
    def after_groups(
        cls, site: nn.Module, members: list[tuple[Any, Group]], x: Any, y: Any, rows: Rows, own: bool
    ) -> Any:
        """`after` for several adapters of this class at once, each on the rows of its group of the batch x, y.

        Args:
            own: y is the site's own output, of this x.
        """
        raise NotImplementedError

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        """The weight (out, in, *kernel) with this adapter folded in.

        Raises:
            MergeError: the method is no linear map of the input, or not with one weight.
        """
        raise MergeError(f"{type(self).__name__} cannot be folded into a weight: {self.not_merged}. "
                         "Keep the adapter attached instead.")  # fmt: skip

    def merged_bias(self, site: nn.Module, bias: Tensor | None) -> Tensor | None:
        """The bias (out,) with this adapter folded in."""
        return bias

    def folded(self, site: nn.Module, name: str, value: Tensor) -> Tensor:
        """The parameter of this name, one of `folds`, as the site finds it; value: as it was, in its own layout."""
        raise NotImplementedError

    def low_rank(self, site: nn.Module) -> tuple[Tensor, Tensor] | None:
        """B (out, r) and A (r, in * kernel) where `merged` adds exactly their product, else None."""
        return None

    def neutral(self, site: nn.Module) -> dict[str, Tensor]:
        """The values of its state with which it does nothing, if all it does is linear in its distance from them."""
        return {}

    def differs(self, other: "Adapter") -> str:
        """In what another adapter computes otherwise, whatever the values of the two; or ''."""
        if type(self) is not type(other):
            return f"kind: {type(self).__name__}, {type(other).__name__}"
        own, its = _settings(self), _settings(other)
        names = [name for name in own | its if own.get(name) != its.get(name) and name not in self.adjusted]
        return f"{names[0]}: {own.get(names[0])}, {its.get(names[0])}" if names else ""

    def state_of(self, other: "Adapter") -> dict[str, Tensor]:
        """The state with which this adapter does what the other one does.

        Raises:
            CheckpointError: there is none.
        """
        if difference := self.differs(other):
            raise CheckpointError(f"it differs in {difference}")
        return other.state_dict()

    def hf_key(self, name: str) -> str:
        """The end of the key under which HF PEFT saves the parameter `name` of this adapter."""
        return self.hf_names.get(name, name)

    def hf_shared_key(self, name: str) -> str:
        """The whole key of an entry that all adapters of a model share, or groups of them; '' for the others."""
        return self.hf_shared.get(name, "")

    def computed(self) -> dict[str, Tensor]:
        """What HF PEFT's file holds that is no parameter here but follows from them, by the end of its key; not read
        back.
        """
        return {}

    def expect(self, keys: Collection[str]) -> None:
        """Take the form in which a file with these keys holds this adapter, before it is read."""

    def parts(self) -> list["Adapter"]:
        """What acts at the site: this adapter, unless it is a union of several."""
        return [self]


def _settings(adapter: Adapter) -> dict[str, Any]:
    """What acts beside the values: their shapes, and plain attributes, except those for training or files only."""
    shapes = {name: tuple(value.shape) for name, value in adapter.state_dict().items()}
    return shapes | {
        f"{path}.{name}".removeprefix("."): value
        for path, module in adapter.named_modules()
        for name, value in vars(module).items()
        if _is_plain(value) and name not in ("training", "dropout") and not name.startswith(("_", "hf_"))
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)


class Union(Adapter):
    """The adapters of several methods at one site, as one: `by_method` has them by the number of the method.

    They nest in that order, as adapters that are active one after another do.
    """

    def __init__(self, by_method: Mapping[int, Adapter]) -> None:
        super().__init__()
        self.by_method = nn.ModuleDict({str(number): adapter for number, adapter in by_method.items()})

    def parts(self) -> list[Adapter]:
        return [part for adapter in self.by_method.values() for part in cast(Adapter, adapter).parts()]

    def expect(self, keys: Collection[str]) -> None:
        for number, adapter in self.by_method.items():
            own = [key.removeprefix(f"{number}.") for key in keys if key.startswith(f"{number}.")]
            cast(Adapter, adapter).expect(own)


class InputAdapter(Adapter):
    """The weights of one adapter that acts on all arguments and results of a module, not on one input and output.

    Its site is the root of the model (module name ""), or a large part of it, such as attention. With f the site's
    own forward and `given` its arguments by name, an active adapter makes the site return

        outputs(site, given, f(**inputs(site, given)))
    """

    on_input: ClassVar[bool] = True
    hf_wraps = 0
    hf_flat: ClassVar[bool] = False  # its keys in HF PEFT's files have no module's name before them
    alone: ClassVar[bool] = False  # only one adapter with such a part can act at a time
    fills_cache: ClassVar[bool] = False  # whether it puts keys and values into the cache, with `fill`
    ahead: int = 0  # how many positions it puts before each row's
    fills_behind: bool = False  # whether rows with fewer of them begin with the others, instead of ending with them
    axis: str = ""  # "decoder_" where those are a decoder's: what the names of the arguments begin with

    def inputs(self, site: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments in place of `given`. Must return new ones, never change `given` in place."""
        return given

    def fill(self, site: nn.Module, cache: Any, states: list[tuple[Tensor, Tensor]]) -> Any:
        """The cache (a new one for None) with keys and values (B, heads, P, width) of each layer in it."""
        raise NotImplementedError

    def outputs(self, site: nn.Module, given: dict[str, Any], result: Any) -> Any:
        """The result in place of `result`; `given` is what came in, before `inputs`."""
        return result

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        raise MergeError(
            f"{type(self).__name__} changes what goes into a module, and no weight can do that. "
            "Keep the adapter attached instead."
        )

    def merged_bias(self, site: nn.Module, bias: Tensor | None) -> Tensor | None:
        return self.merged(site, torch.empty(0))


class TrainedCopy(Adapter):
    """`modules_to_save`: a copy of the whole module is trained; the base's own stays as it is.

    On a half-precision base the copy is float32, since steps of training are smaller than half precision shows.
    """

    replacement: nn.Module

    def __init__(self, replacement: nn.Module, hf_path: str = "") -> None:
        """hf_path: where in an adapted module HF PEFT keeps the copy."""
        super().__init__()
        self.replacement = replacement
        self.hf_path = hf_path
        for parameter in replacement.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(weights.master_dtype(parameter.dtype))

    def before(self, site: nn.Module, x: Any) -> Any:
        return _cast(x, weights.compute_dtype(self.replacement))

    def after(self, site: nn.Module, x: Any, y: Any) -> Any:
        return _cast(y, weights.compute_dtype(site))

    def merged(self, site: nn.Module, weight: Tensor) -> Tensor:
        return weights.read(self.replacement) if weights.layout(site) else self.replacement.weight  # type: ignore[return-value]

    def merged_bias(self, site: nn.Module, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else self.replacement.bias  # type: ignore[return-value]

    def neutral(self, site: nn.Module) -> dict[str, Tensor]:
        own, copied = site.state_dict(), self.replacement.state_dict()
        return {f"replacement.{name}": own[name] for name, value in copied.items() if value.is_floating_point()}

    def hf_key(self, name: str) -> str:
        return self.hf_path + name.removeprefix("replacement.")


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


class PeftConfig(BaseModel, ABC):
    """Settings common to all methods; keyword arguments and their meanings are HF PEFT's.

    Raises:
        ConfigError: an unknown keyword (named with the closest known one), or a value of the wrong type.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)
    peft_type: ClassVar[str]
    trains: ClassVar[str]  # for the list of methods: what it trains, in a few words,
    when: ClassVar[str]  # when to use it,
    evidence: ClassVar[str]  # its strengths and weaknesses, and who has shown them
    relative_rate: ClassVar[float] = 1.0  # the learning rate that suits it, in LoRA's (docs/benchmarks/methods.md)
    hf_root: ClassVar[str] = "base_model.model."  # what HF PEFT puts before a module's name
    hf_prefix: ClassVar[str] = ""  # with which HF PEFT's names of this method's weights begin
    hf_only: ClassVar[dict[str, Any]] = {}  # HF PEFT's keywords not offered here -> the value that switches them off
    example: ClassVar[dict[str, Any]] = {}  # settings without which the method's example would not run
    found_in_training: ClassVar[frozenset[str]] = frozenset()  # settings that training writes, loaded with the weights
    not_in_hf: ClassVar[frozenset[str]] = frozenset()  # keywords HF PEFT lacks: left out of the file while None
    counts_steps: ClassVar[str | None] = None  # the setting that is the number of all optimizer steps
    compares_layers: ClassVar[bool] = False  # shares out a budget among all layers, which must train at once

    task_type: TaskType | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None

    def __init__(self, **settings: Any) -> None:
        known = type(self).model_fields
        for key in [key for key in settings if key not in known]:
            if key not in self.hf_only:
                raise ConfigError(f"{type(self).__name__} has no setting {key!r}.{did_you_mean(key, known)}")
            if settings.pop(key) not in (self.hf_only[key], None):
                raise ConfigError(f"{key} is a setting of HF PEFT's {type(self).__name__} that trimtab does not offer.")
        try:
            super().__init__(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"][:1])
            reason = first["msg"].removeprefix("Value error, ")
            at = f"{where}={settings[where]!r}: " if where in settings else ""
            raise ConfigError(f"{type(self).__name__}: {at}{reason}.".replace("..", ".")) from None

    def resolved(self, model: nn.Module) -> Self:
        """The same config with everything that was left to the model written out, so that it can be saved."""
        return self

    def union_of(self) -> list["PeftConfig"]:
        """The configs of which this is a union, if it is one."""
        return []

    @abstractmethod
    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        """New adapters for this model, by module name. Builds them and changes nothing.

        Raises:
            TargetError: nothing matches, or a matching module cannot be adapted.
        """

    @property
    def acts_on_rows(self) -> bool:
        """Whether the adapters act on each row as a whole, not on each token alike: before it, or at its ends."""
        return False

    @property
    def makes_loss(self) -> bool:
        """Whether the adapters make the model's loss, in place of its own."""
        return False

    @property
    def is_final(self) -> bool:
        """Whether the adapters have the shape that training ends with. Before, no checkpoint is the best one."""
        return True

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        """A term to add to the loss in training, or None. `adapters` are this config's, by module name."""
        return None

    def stepped(self, adapters: Mapping[str, Adapter], optimizer: Optimizer) -> None:
        """What is done after each step of the optimizer that trains these adapters, while gradients are still there.

        What must outlast an interruption belongs into `optimizer.state`, which is saved and resumed.
        """

    def packed(self, path: str, entry: str, value: Tensor) -> Tensor:
        """What a file holds of the entry of the adapter at a module: by default all of it."""
        return value

    def unpacked(self, path: str, entry: str, value: Tensor, into: Tensor) -> Tensor:
        """The entry, from what a file holds of it; `into` is what is there now, and must not be changed."""
        return value

    def to_save(self) -> "PeftConfig":
        """The config of what is saved, where that is another than of what is trained."""
        return self

    def to_dict(self) -> dict[str, Any]:
        settings = self.model_dump(mode="json")
        kept = {key: value for key, value in settings.items() if value is not None or key not in self.not_in_hf}
        return {"peft_type": self.peft_type, **kept}

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.write(Path(folder) / files.CONFIG)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, revision: str | None = None, subfolder: str = "") -> Self:
        """The config saved in `folder` (or in that repository of the hub), as the class its peft_type names.

        Raises:
            CheckpointError: no adapter there, or one of a method or with a setting that trimtab does not have.
        """
        path = files.current(files.locate(folder, revision, subfolder), files.CONFIG)
        if not path.is_file():
            raise CheckpointError(f"{folder} holds no adapter: there is no {files.CONFIG} in it.")
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged or no JSON file: {error}.") from None
        if not isinstance(settings, dict) or not isinstance(settings.get("peft_type"), str):
            raise CheckpointError(f"{path} is not an adapter's configuration: it names no peft_type.")
        settings.pop("peft_version", None)
        try:
            return cls.from_dict(settings)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """What `to_dict` gave, as the class its peft_type names. Raises: ConfigError."""
        peft_type, own = settings["peft_type"], {name: settings[name] for name in settings if name != "peft_type"}
        methods = {config.peft_type: config for config in _concrete(cls) or [cls]}
        if peft_type not in methods:
            raise ConfigError(f"It is of the method {peft_type!r}.{did_you_mean(peft_type, methods)}")
        return methods[peft_type](**own)


def _concrete(config: type[PeftConfigT]) -> list[type[PeftConfigT]]:
    own = [config] if "peft_type" in vars(config) else []  # a user's subclass has its method's
    return own + [found for child in config.__subclasses__() for found in _concrete(child)]
