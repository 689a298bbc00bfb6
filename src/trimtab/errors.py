"""Every error this library raises on purpose, and the "did you mean" behind their messages.

    TrimtabError
    ├── ConfigError       a setting that is unknown, contradictory or out of range
    │   └── RecipeError   the same in a recipe file, with file and line
    ├── TargetError       targets that match nothing, or a layer the method cannot adapt
    ├── AdapterError      an adapter name that exists already, or does not exist
    ├── MergeError        weights that cannot be folded into the base
    ├── CheckpointError   a folder that holds no adapter, or one that does not fit this model
    ├── DataError         a data file that cannot be read, or holds nothing to learn from
    └── TrainingError     a run that cannot come to anything: a loss that is no number, weights that never change

All of them are `ValueError`s. A message says which rule was broken, by which value, and what to do next.
"""

import difflib
import math
import sys
import warnings
from collections.abc import Iterable


class TrimtabError(ValueError):
    """Root of the tree; the command line turns it into one line and exit code 2."""


class ConfigError(TrimtabError):
    pass


class RecipeError(ConfigError):
    pass


class TargetError(TrimtabError):
    pass


class AdapterError(TrimtabError):
    pass


class MergeError(TrimtabError):
    pass


class CheckpointError(TrimtabError):
    pass


class DataError(TrimtabError):
    pass


class TrainingError(TrimtabError):
    pass


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside this library that led here, however deep the call."""
    level, package = 2, f"{__package__}."
    while f"{sys._getframe(level - 1).f_globals.get('__name__')}.".startswith(package):
        level += 1
    warnings.warn(message, category, level)


def closest(word: str, options: Iterable[str], n: int = 3) -> list[str]:
    """The options most like `word`, best first; a dotted option is also compared by its last part."""
    names = list(dict.fromkeys(options))
    lowered = {name: (name.lower(), name.lower().rsplit(".", 1)[-1]) for name in names}

    def likeness(name: str) -> float:
        return max(difflib.SequenceMatcher(None, word.lower(), part).ratio() for part in lowered[name])

    return [name for name in sorted(names, key=likeness, reverse=True) if likeness(name) >= 0.6][:n]


def closest_divisor(wanted: int, *sizes: int) -> int:
    """The number closest to `wanted` that divides all of these."""
    most = math.gcd(*sizes)
    return min((number for number in range(1, most + 1) if most % number == 0), key=lambda number: abs(number - wanted))


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """' Did you mean 'x'?', or the list of what exists where nothing is close, or ''."""
    names = list(dict.fromkeys(options))
    if close := closest(word, names, 1):
        return f" Did you mean {close[0]!r}?"
    return f" There is: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}." if names else ""
