"""Dependent launches: each kernel keeps the rule (interpret_dependent.py), and who is told to be dependent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gemma4_compile.ops import dependent
from gemma4_compile.ops.dependent import EARLY, PLAIN, WAIT, alone, behind, constants, first
from tests.ops.dependent_cases import KEPT
from tests.ops.interpreted import interpreted


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    return interpreted("tests.ops.interpret_dependent")


@pytest.mark.slow
@pytest.mark.parametrize("case", [*KEPT, "attention", *(f"bad kernel {way}" for way in range(5))])
def test_the_rule(case: str, report: dict[str, str]) -> None:
    assert report.get(case) == "ok"


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dependent, "supported", lambda: True)
    yield


def kinds(*weights: torch.Tensor | None) -> tuple[int, int, int]:
    return alone(*weights).kind, first(*weights).kind, behind(*weights).kind


def test_nothing_is_dependent_without_a_gpu_that_can() -> None:
    weight = torch.ones(4, 4)
    with constants([weight]):
        assert kinds(weight) == (PLAIN, PLAIN, PLAIN)
        assert not alone(weight).options and not behind(weight).options


def test_weights_are_read_early_where_they_are_known(on_hopper: None) -> None:
    stacked = torch.ones(2, 4, 4)
    weight, view, other = torch.ones(4, 4), stacked[1], torch.ones(4)
    assert kinds(weight) == (PLAIN, EARLY, EARLY)  # plainly, a kernel and the first of several
    with constants([weight, stacked]):
        assert kinds(weight) == kinds(view) == kinds(weight, view, None) == (EARLY, EARLY, EARLY)
        assert kinds(other) == kinds(weight, other) == kinds(weight.T) == kinds() == (WAIT, WAIT, WAIT)
        with constants([other]):
            assert kinds(weight) == (WAIT, WAIT, WAIT)
        assert alone(weight).options == first(weight).options == {"launch_pdl": True}
    assert not alone(weight).options and not first(weight).options
    assert behind(weight).options == {"launch_pdl": True}


def test_other_threads_launch_plainly(on_hopper: None) -> None:
    from concurrent.futures import ThreadPoolExecutor

    weight = torch.ones(4)
    with ThreadPoolExecutor(1) as others, constants([weight]):
        assert others.submit(kinds, weight).result() == (PLAIN, EARLY, EARLY)
