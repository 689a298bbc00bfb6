"""Several trainings over one frozen base, in step: what all of them compute with the base is computed once for all.

Each job is a whole training of its own, in a greenlet of its own: its model, whose base has everybody's weights, its
data, Trainer, optimizer, schedule and random numbers. One runs at a time. Where a job in a training step calls a part
of the base (a child of its model, such as the encoder or `lm_head`) it waits, until all jobs have come so far. Then
the part runs once on the rows of all, each under the adapter of its job (rows.py), and each job goes on with its own
rows of the result: to its own loss, from its own labels. At the backward pass they meet again. What cannot be put into
one batch with the others each computes for itself.

So a job computes what it would alone. Its random numbers (also those of the base's dropout) are drawn for its rows in
the shape and order, and from the state, in which they are drawn alone.
"""

import contextlib
import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from greenlet import greenlet  # type: ignore[import-untyped]
from torch import Tensor, nn

from . import calls, sites, swap, weights
from .attach import trunk
from .calls import Call
from .draws import OwnDraws, Randomness, State, draws, refuse_unknown
from .errors import ConfigError
from .routing import acting
from .rows import Group, Rows
from .sites import Active
from .swap import Swapped
from .targets import is_linear

KEPT = 8  # kinds of batches: by the jobs that are in them, and their numbers of rows and tokens
MIXING = ("expert_capacity", "output_router_logits")  # settings by which one row changes what another one gives


class Cancelled(BaseException):
    """Ends a job from within, past all that handles errors."""


@dataclass(eq=False)
class Backward:
    """A job waits for the gradients of its loss."""

    loss: Tensor


class JobRows(Rows):
    """The rows of several jobs, one after another, each to be drawn for from its own random numbers."""

    def __init__(self, jobs: Sequence["Job"], sizes: Sequence[int], lengths: Mapping[str, int] | None) -> None:
        super().__init__([job.name for job, size in zip(jobs, sizes, strict=True) for _ in range(size)], lengths)
        self.jobs = {job.name: job for job in jobs}

    @contextlib.contextmanager
    def turn(self, group: Group) -> Iterator[None]:
        job = self.jobs.get(group.name)
        if job is None:
            yield
            return
        self.turning = True
        try:
            with job.randomness.drawing():
                yield
        finally:
            self.turning = False

    def begin(self) -> dict[str, State]:
        return {name: job.randomness.tensors for name, job in self.jobs.items()}

    @contextlib.contextmanager
    def again(self, begun: Any) -> Iterator[None]:
        now = self.begin()
        self._set(begun)
        try:  # PyTorch leaves by an exception when it has what it needs
            with self.drawn():
                yield
        finally:
            self._set(now)

    def _set(self, states: Any) -> None:
        for name, job in self.jobs.items():
            job.randomness.tensors = states[name]

    def drawn(self) -> contextlib.AbstractContextManager[Any]:
        """Around what the base computes: what it draws is drawn job by job, if it draws anything."""
        some = next(iter(self.jobs.values()))
        return OwnDraws(self) if some.lockstep.draws else contextlib.nullcontext()


@dataclass(eq=False)
class Job:
    """One training. `run` is all of it."""

    name: str
    run: Callable[["Job"], Any]
    lockstep: "Lockstep"
    randomness: Randomness
    result: Any = None
    error: Exception | None = None
    done: bool = False
    alone: str = ""  # why it computes everything for itself, if it does
    stepping: bool = False  # whether it is in a training step, in which it meets the others
    request: Call | Backward | None = None
    answer: Any = None
    thread: greenlet = field(init=False)

    def __post_init__(self) -> None:
        self.thread = greenlet(self.whole)

    def whole(self) -> None:
        try:
            self.result = self.run(self)
        except Cancelled:
            pass
        except Exception as error:  # of whatever kind, it is this job's alone
            self.error = error
        finally:
            self.lockstep.leave(self)
            self.done = True

    def wait(self, request: Call | Backward) -> Any:
        self.request, self.answer = request, None
        with _apart_from_autocast(request):
            assert self.thread.parent is not None
            self.thread.parent.switch()
        return self.answer

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around the forward and backward pass of a training step."""
        self.stepping = not self.alone
        try:
            yield
        finally:
            self.stepping = False

    def backward(self, loss: Tensor) -> None:
        self.wait(Backward(loss)) if self.stepping else loss.backward()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _apart_from_autocast(request: Call | Backward) -> Iterator[None]:
    """While a job waits others run in the same thread, to which autocast belongs."""
    device = request.device if isinstance(request, Call) and request.autocast else None
    if device:
        torch.set_autocast_enabled(device, False)
    yield
    if device:
        torch.set_autocast_enabled(device, True)


@dataclass
class Part:
    """Answers the calls of a job's part of the base."""

    job: Job
    name: str

    def __deepcopy__(self, memo: Any) -> "Part":
        return self


class Meeting(Swapped, nn.Module):
    """A part of a job's base, whose computation is done for all jobs together. Adapters at the part are around it."""

    order: ClassVar[int] = -1
    _part: Part

    _arguments: ClassVar[tuple[str, ...]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        job = self._part.job
        if not job.stepping or len(args) > len(self._arguments):
            return super().forward(*args, **kwargs)
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        given.pop(calls.UNUSED, None)
        device = next((value.device.type for value in given.values() if isinstance(value, Tensor)), "cpu")
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        answer = job.wait(Call(self._part.name, given, device, autocast, is_linear(self) and len(given) == 1))
        return super().forward(*args, **kwargs) if answer is None else answer


class Lockstep:
    """Runs jobs to their ends. What is computed for all is computed in the greenlet that called `run`."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.active = Active()
        self.shared = self.apart = 0  # calls of the base that were computed with others', and by themselves
        self.plain: Any = None  # the base without adapters, to be copied for jobs
        self.base: Any = None  # with the adapters of all jobs, by their names
        self.fresh: list[str] = []
        self.rows: dict[Hashable, JobRows] = {}  # of batches so far, while the same adapters are there
        self.draws = False  # whether the base draws random numbers in training

    def run(self, runs: Iterable[Callable[[Job], Any]], at_once: int | None = None) -> list[Job]:
        """All of these to their ends. An error of a job is kept in it, and stops no other.

        Args:
            at_once: how many go on at a time; where one ends the next one joins. All, by default.
        """
        before = Randomness.now()
        self.jobs = [Job(f"job{number}", run, self, before) for number, run in enumerate(runs)]
        later, going = list(self.jobs), list[Job]()
        try:
            while later or going:
                ready = self._serve(going)
                while later and len(going) < (at_once or len(self.jobs)):
                    going.append(later.pop(0))
                    ready.append(going[-1])
                for job in ready:
                    self._resume(job)
                going = [job for job in going if not job.done]
        finally:
            for job in going:
                if job.thread:  # it has begun, and not ended
                    job.thread.throw(Cancelled)
            before.go_on()
        return self.jobs

    def _resume(self, job: Job) -> None:
        """Let a job go on until it waits again, or ends."""
        job.randomness.go_on()
        job.thread.switch()
        job.randomness = Randomness.now()

    def load(self, load: Callable[[], tuple[Any, list[str]]]) -> tuple[Any, list[str]]:
        """A job's own base model with the weights of all, and the names of its new modules, as `load` gives them.

        Raises: ConfigError, where one row of a batch changes what the model makes of another.
        """
        if self.plain is not None and not self.fresh:
            return _sharing(self.plain), []
        model, fresh = load()  # new modules are drawn from the job's own random numbers
        if self.plain is None:
            _check_rows_apart(model)
            self.plain, self.base, self.fresh = _sharing(model), _sharing(model), fresh
            for part in list(self.base.modules()):
                sites.freeze_statistics(part)
            self.base.requires_grad_(False).train()
            self.draws = draws(self.base)
        else:
            _share(model, self.plain)
        return model, fresh

    def join(self, job: Job, model: Any, apart: nn.Module | None = None, checkpointing: Any = None) -> None:
        """Let the job's model, with its adapter on it, meet the others'.

        Args:
            apart: a part that the job calls by itself.
            checkpointing: settings, if layers are to be checkpointed.
        """
        if job.alone:
            return
        self.rows.clear()
        own, modules = trunk(model), dict(self.base.named_modules())
        parts = {name: part for name, part in model.named_children() if next(part.parameters(), None) is not None}
        for path, adapter in own.adapters("default").items():
            if path.partition(".")[0] in parts and "." in path:
                sites.add(modules[path], modules[path.rpartition(".")[0]], job.name, adapter, self.active)
        for name, part in parts.items():
            if part is apart:
                continue
            vars(part)["_part"] = Part(job, name)
            swap.swap_in(part, Meeting)
        if checkpointing is not None:
            self.base.activation_checkpointing_enable(checkpointing)

    def leave(self, job: Job) -> None:
        self.rows.clear()
        for site in list(sites.sites(self.base)) if self.base is not None else ():
            if job.name in sites.adapters(site):
                sites.remove(site, job.name)

    def _serve(self, waiting: list[Job]) -> list[Job]:
        """Answer the calls of those that wait, or where all are so far compute their gradients; who can go on."""
        calls = [job for job in waiting if isinstance(job.request, Call)]
        forms: dict[Hashable, list[Job]] = {}
        for job in calls:
            forms.setdefault(cast(Call, job.request).form() or id(job), []).append(job)
        for jobs in forms.values():
            self._answer(jobs)
        if calls or not waiting:
            return calls
        torch.autograd.backward([cast(Backward, job.request).loss for job in waiting])
        return waiting

    def _answer(self, jobs: list[Job]) -> None:
        """Compute one part of the base for all of these. Where that fails, each shall try by itself."""
        self.apart += len(jobs)
        if len(jobs) == 1:
            return  # the same, with less to do
        begun = [job.randomness.tensors for job in jobs]
        try:
            answers = self._together(jobs, [cast(Call, job.request) for job in jobs])
        except Exception:  # whose fault it is will show
            for job, state in zip(jobs, begun, strict=True):
                job.randomness.tensors = state
            return
        self.shared, self.apart = self.shared + len(jobs), self.apart - len(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            job.answer = answer

    def _together(self, jobs: list[Job], asked: list[Call]) -> list[Any]:
        part, autocast = self.base.get_submodule(asked[0].part), asked[0].autocast
        device = next(value.device for value in asked[0].given.values() if isinstance(value, Tensor))
        if next(self.base.parameters()).device != device:
            self.base.to(device)
        with torch.autocast(device.type, autocast, autocast is not None):
            if asked[0].flat:
                return calls.flat(part, asked)
            rows, arguments = self._rows(jobs, asked), calls.together(asked)
            with acting(self.active, rows, part), rows.drawn():
                result = part(**arguments)
        return calls.apart(result, asked)

    def _rows(self, jobs: list[Job], asked: list[Call]) -> JobRows:
        """Those of the last such batch, with what sites made of them."""
        key = tuple((job.name, call.size, call.length) for job, call in zip(jobs, asked, strict=True))
        if key not in self.rows:
            if len(self.rows) == KEPT:
                self.rows.clear()
            lengths = {name: length for name, _, length in key}
            differ = lengths if len(set(lengths.values())) > 1 else None
            self.rows[key] = JobRows(jobs, [size for _, size, _ in key], differ)
            self.rows[key].tokens = {max(lengths.values())}
        return self.rows[key]


def _sharing(model: nn.Module) -> Any:
    """A copy of the model around the same parameters and buffers."""
    states = [state for part in model.modules() if (state := weights.shared_state(part)) is not None]
    return copy.deepcopy(model, {id(value): value for value in (*model.parameters(), *model.buffers(), *states)})


def _share(model: nn.Module, base: nn.Module) -> None:
    """Put the base's parameters in the place of the model's own where they are equal."""
    known, parts = dict(base.named_parameters()), dict(base.named_modules())
    for path, module in model.named_modules():
        if weights.shared_state(module) is not None:
            module.state = parts[path].state
        for name, value in module._parameters.items():
            other = known.get(f"{path}.{name}".removeprefix("."))
            if value is not None and other is not None and torch.equal(value, other):
                module._parameters[name] = other


def _check_rows_apart(model: Any) -> None:
    config = getattr(model, "config", None)
    for setting in MIXING:
        if getattr(config, setting, None):
            raise ConfigError(f"{type(model).__name__} has {setting}={getattr(config, setting)}: rows of a batch act "
                              "on each other, so jobs cannot share one. Train them one by one.")  # fmt: skip
    for name, part in model.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            raise ConfigError(
                f"{name} takes means over all rows of a batch, so jobs cannot share one. Train them one by one."
            )
    refuse_unknown(model)
