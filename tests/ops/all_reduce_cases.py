"""What the one-shot all-reduces are tested with, in processes under the interpreter, on streams of a GPU and between GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gemma4_compile.ops import OPS
from gemma4_compile.ops.distributed.all_reduce_norm import FORMS
from gemma4_compile.ops.examples import Sizes, example
from tests.ops.kernel_cases import outputs


def arguments(op: str, sizes: Sizes, tokens: int, dtype: torch.dtype, device: str, turn: int, rank: int) -> list[Any]:
    """A rank's in a turn: what is summed is its own, everything else is equal on all."""
    torch.manual_seed(turn)
    found = list(example(op, sizes, tokens, dtype, device))
    torch.manual_seed(7919 * turn + rank + 1)
    for i in range(FORMS[op].sums):
        found[i] = torch.randn_like(found[i])
        found[i][..., 3] = -0.0  # which the memory holds before a row has come
    return found


def over_the_sums(op: str, parts: Sequence[list[Any]]) -> tuple:
    """The op's own kernel over the ranks' parts, added in their order in fp32 and rounded once."""
    sums = FORMS[op].sums
    totals = [sum(part[i].float() for part in parts).to(parts[0][i].dtype) for i in range(sums)]  # type: ignore[union-attr]
    return outputs(OPS[op].launch(*totals, *parts[0][sums:]))
