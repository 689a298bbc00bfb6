"""Every promise of the contract, for every method."""

from collections.abc import Callable

import battery
import pytest
from battery import ALL_SMALL_CONFIGS, CHECKS, Case

from trimtab import UnionConfig
from trimtab.methods import METHODS


@pytest.mark.parametrize("case", ALL_SMALL_CONFIGS, ids=lambda case: case.id)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_method(case: Case, check: Callable[[Case], None]) -> None:
    battery.check(case, check)


def test_every_method_has_a_case() -> None:
    assert {type(case.config) for case in ALL_SMALL_CONFIGS} == {*METHODS.values(), UnionConfig}


def test_every_check_is_in_the_table() -> None:
    written = {
        found for name, found in vars(battery).items()
        if callable(found) and getattr(found, "__annotations__", {}) == {"case": Case, "return": None}
    }  # fmt: skip
    assert written - {battery.refuses_to_merge} == set(CHECKS)


def test_every_exception_is_about_a_check_and_has_a_reason() -> None:
    for case in ALL_SMALL_CONFIGS:
        for part, reason in case.skips.items():
            assert any(part in check.__name__ for check in CHECKS), (case.id, part)
            assert len(reason) > 20, (case.id, part)
