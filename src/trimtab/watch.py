"""Long steps of work, told to whoever shows them: bars on a terminal (progress.py), else nobody."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Show = Callable[[str, int | None], AbstractContextManager[Callable[[], object]]]


@contextmanager
def _unseen(_what: str, _total: int | None) -> Iterator[Callable[[], object]]:
    yield lambda: None


shown: ContextVar[Show] = ContextVar("shown", default=_unseen)


def busy(what: str) -> AbstractContextManager[object]:
    """A step of which it is not known how far it is."""
    return shown.get()(what, None)


def through(what: str, items: Sequence[T]) -> Iterator[T]:
    """The items, one after another."""
    with shown.get()(what, len(items)) as advance:
        for item in items:
            yield item
            advance()
