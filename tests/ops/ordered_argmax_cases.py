"""Arguments of gemma4::ordered_argmax, and checks of its kernels that hold under the interpreter as on a GPU."""

from collections.abc import Callable
from typing import Any

import torch

from gemma4_compile.ops import ordered_argmax, ordered_scores

VOCABULARY, CLUSTERS, HIDDEN, TOP_K = 640, 40, 48, 7


def arguments(rows: int, dtype: torch.dtype, equal: int = 0, device: str = "cpu") -> tuple[Any, ...]:
    """Distinct scores of clusters; so many tokens have the same embedding."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn((VOCABULARY, HIDDEN), generator=generator)
    weight[torch.randperm(VOCABULARY, generator=generator)[:equal]] = weight[7].clone()
    ordering = torch.randperm(VOCABULARY, generator=generator)
    scores = torch.rand((rows, CLUSTERS), generator=generator).argsort(-1).float() - CLUSTERS / 2
    states = torch.randn((rows, HIDDEN), generator=generator).to(dtype)
    return states.to(device), scores.to(device, dtype), ordering.to(device), weight.to(device, dtype), TOP_K


def check(args: tuple[Any, ...]) -> None:
    wanted, found = ordered_argmax.reference(*args), ordered_argmax.launch(*args)
    assert found.dtype == torch.int64 and found.tolist() == wanted.tolist()
    logits, tokens = ordered_scores.launch(*args)
    wanted_logits, wanted_tokens = ordered_scores.reference(*args)
    assert torch.equal(tokens, wanted_tokens)
    torch.testing.assert_close(logits, wanted_logits)


def plain(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (1, 5):
            check(arguments(rows, dtype, device=device))


def ties(device: str) -> None:
    """Nearly all tokens are equal; then all clusters, of which any may be taken, so the tokens of all of them."""
    check(arguments(5, torch.bfloat16, equal=VOCABULARY - 30, device=device))
    states, scores, ordering, weight, _ = arguments(3, torch.float32, device=device)
    check((states, torch.zeros_like(scores), ordering, weight, CLUSTERS))


def extremes(device: str) -> None:
    """Infinite scores, and one cluster; rows that are not numbers give a token."""
    states, scores, ordering, weight, _ = arguments(4, torch.float32, device=device)
    scores[:, :3], scores[:, 5:9] = float("inf"), float("-inf")
    for top_k in (3, CLUSTERS):
        check((states, scores, ordering, weight, top_k))
    check((states, arguments(4, torch.float32, device=device)[1], ordering, weight, 1))
    states[1:3] = float("nan")
    scores[2:] = float("nan")
    found = ordered_argmax.launch(states, scores, ordering, weight, TOP_K)
    assert ((found >= 0) & (found < VOCABULARY)).all()


def strides(device: str) -> None:
    states, scores, ordering, weight, top_k = arguments(4, torch.bfloat16, device=device)
    wide = torch.cat((states, states), 1)
    check((wide[:, :HIDDEN], torch.cat((scores, scores), 1)[:, :CLUSTERS], ordering, weight.T.contiguous().T, top_k))


CASES: dict[str, Callable[[str], None]] = {"plain": plain, "ties": ties, "extremes": extremes, "strides": strides}
