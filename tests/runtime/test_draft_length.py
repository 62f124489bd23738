"""K of a round: fixed, by batch, and what an adaptive one makes of acceptance and times."""

import random

import pytest

from gemma4_compile.runtime.speculative.length import MOST, DraftLength


def test_fixed_and_by_batch() -> None:
    fixed, by_batch = DraftLength(3), DraftLength({1: 4, 16: 2, 64: 0})
    assert [fixed.choose(n) for n in (1, 500)] == [3, 3] and fixed.most == 3
    assert [by_batch.choose(n) for n in (0, 1, 15, 16, 63, 64, 200)] == [0, 4, 4, 2, 2, 0, 0] and by_batch.most == 4


def test_the_lengths_that_rounds_can_have() -> None:
    by_batch = DraftLength({1: 4, 16: 2, 64: 0})
    assert by_batch.lengths(1, 1) == [4] and by_batch.lengths(9, 16) == [4, 2] and by_batch.lengths(64, 80) == []
    assert DraftLength(3).lengths(1, 256) == [3]
    assert DraftLength("adaptive").lengths(2, 4) == [6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("chance", "cost", "wanted"),
    [(0.95, 0.02, {6}), (0.0, 0.2, {0}), (0.5, 0.2, {1, 2}), (0.75, 0.12, {2, 3, 4})],
)
def test_adaptive(chance: float, cost: float, wanted: set[int]) -> None:
    """Each draft is right with this chance, and lengthens a round by this share: most rounds have the K that gives most tokens
    a second. The first round of each length takes ten times as long, as graphs are captured."""
    chooser, length, chosen = random.Random(0), DraftLength("adaptive"), []
    seen: set[int] = set()
    for _ in range(2000):
        k = length.choose(8)
        chosen.append(k)
        accepted = 0
        while accepted < k and chooser.random() < chance:
            accepted += 1
        if k:
            length.observe(k, accepted)
        length.took(8, k, (1 + cost * k) * (1 if k in seen else 10))
        seen.add(k)
    late = chosen[200:]
    assert set(chosen) == set(range(MOST + 1))
    assert sum(k in wanted for k in late) > 0.9 * len(late)


def test_adaptive_follows_a_change_of_text() -> None:
    length, late = DraftLength("adaptive"), []
    for turn in range(12_000):
        k = length.choose(1)
        right = 0 if turn < 4000 else k
        if k:
            length.observe(k, right)
        length.took(1, k, 1 + 0.1 * k)
        late += [k] if turn > 11_000 or 3000 < turn < 4000 else []
    assert late[:999].count(0) > 900 and late[999:].count(MOST) > 900


@pytest.mark.parametrize("wanted", [0, -1, True, 1.5, {}, {1: 0}, {1: -2}, {-1: 2}, {1: 1.5}, "often", None])
def test_what_cannot_be(wanted: object) -> None:
    with pytest.raises(ValueError, match="speculative tokens must be 1 or more"):
        DraftLength(wanted)  # type: ignore[arg-type]
