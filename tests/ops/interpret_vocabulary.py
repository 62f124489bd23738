"""Runs the kernels of a divided vocabulary under Triton's interpreter and prints a line a case. Started by test_vocabulary.py.

Ranks sample; each op that they call on the way must give the same by its kernel as by its reference, and all of them the
tokens of `sample`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.ops.interpret import run  # isort: skip  (before all that imports Triton: it switches the interpreter on)

import threading

import torch

from gemma4_compile.ops.library import Op
from gemma4_compile.ops.sampling import local_sample, vocabulary
from gemma4_compile.ops.sampling.sample import sample
from gemma4_compile.ops.sampling.vocabulary import THRESHOLDS
from tests.ops.sample_cases import MIXES, awkward, mixture, parameters
from tests.ops.vocabulary_cases import Ranks

NAMES = ("local_highest", "local_draw", "drawn_token", "begin_search", "digit_histogram", "next_digit")
ALIKE = ("drawn_token", "begin_search", "next_digit")  # on all ranks: every other call is enough
ONE_AT_A_TIME = threading.Lock()  # the interpreter knows one program
CALLS = Counter[str]()


def both(name: str) -> Callable[..., Any]:
    op: Op[Any, Any] = getattr(local_sample, name)

    def call(*args: Any) -> Any:
        wanted = op.reference(*args)
        with ONE_AT_A_TIME:
            CALLS[name] += 1
            found = wanted if name in ALIKE and CALLS[name] % 2 else op.launch(*args)
        for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (wanted, found)), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), f"{name}: {(a != b).nonzero()[:3].tolist()} of {list(a.shape)}"
        return found

    return call


for _name in NAMES:
    setattr(vocabulary, _name, both(_name))


def check(args: tuple[torch.Tensor, ...], thresholds: Any = THRESHOLDS, ranks: int = 2) -> None:
    CALLS.clear()
    found = Ranks(ranks, setattr).call("sample", *args, thresholds)
    assert torch.equal(found, sample.reference(*args)), args[1:]
    assert CALLS["local_draw"] == CALLS["drawn_token"] == ranks
    assert CALLS["digit_histogram"] == 3 * ranks * len({"top_k", "top_p"} & set(thresholds))


def mixtures() -> None:
    check(mixture(9, 256))
    plain = parameters([(0, 1.0, 0.0)] * 4)
    check((torch.randn(4, 256), *plain), ())
    check((torch.randn(4, 256), *plain), ("top_k",), ranks=4)
    check((torch.randn(4, 256), *parameters([(0, 1.0, 5.0)] * 4)), ("min_p",))
    assert torch.equal(Ranks(2, setattr).call("argmax", logits := torch.randn(9, 64)), logits.argmax(dim=1))


def ties() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        logits, *rest = mixture(6, 256, scale=2.0)
        check((logits.to(dtype), *rest))


def awkward_rows() -> None:
    check((awkward(200), *parameters(MIXES[30:45])))


def neighbours() -> None:
    logits = 1.0 + torch.stack([torch.randperm(208) - 104 for _ in range(6)]) * 2.0**-23
    temperature, *rest = parameters([(3, 1.0, 0.0), (10, 0.5, 0.0), (0, 0.02, 0.0)] * 2)
    check((logits, torch.ones_like(temperature), *rest))


def tiles() -> None:
    """Parts of more than one tile, the last of them not full; a part that is no power of two."""
    check(mixture(2, 9000))
    check(mixture(4, 24), ranks=2)


def strides() -> None:
    logits, *rest = mixture(3, 256)
    wide = torch.randn(3, 333)
    wide[:, 7:263] = logits
    check((wide[:, 7:263], *(torch.stack((t, t), dim=1)[:, 0] for t in rest)))
    check((logits.t().contiguous().t(), *rest))


def no_rows() -> None:
    check(tuple(a[:0] for a in mixture(5, 64)))


CASES: dict[str, Callable[[], None]] = {
    "mixtures": mixtures,
    "ties": ties,
    "awkward rows": awkward_rows,
    "neighbours": neighbours,
    "tiles": tiles,
    "strides": strides,
    "no rows": no_rows,
}


if __name__ == "__main__":
    run(CASES)
