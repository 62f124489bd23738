"""Which CUDA graphs an engine has, and their capture before the first request."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

from torch import Tensor

from gemma4_compile.graphs.buckets import Buckets, fitting
from gemma4_compile.graphs.dispatch import GraphRunner
from gemma4_compile.runtime.speculative.drafter import Drafter
from gemma4_compile.runtime.speculative.length import DraftLength

_MOST_TOKENS = 8192  # of a step with graphs


def buckets_of(rows: int, tokens: int, drafts: int) -> Buckets:
    """The sizes that steps of an engine can have.

    rows    of a step that want logits at most
    tokens  of a step at most
    drafts  K
    """
    usual = Buckets()
    most = min(rows, 256 * (1 + drafts))
    decode = within((*usual.decode, *range(320, most, 64)), rows)
    return Buckets(decode, within(usual.tokens, min(tokens, _MOST_TOKENS)), within(usual.rows, most))


def within(sizes: Iterable[int], most: int) -> tuple[int, ...]:
    """Those below the most, and that."""
    return tuple(sorted({*(size for size in sizes if size < most), most}))


# Of a step: its tokens and wanted rows, as buckets, and its requests.
Step = tuple[int, int, int]


def capture(
    graphs: GraphRunner, padding_step: Callable[[int, int, int, int], dict[str, Tensor]], width: int, page_size: int,
    attention: Callable[[int, int, int], Iterable[Hashable]],
) -> Iterator[str]:  # fmt: skip
    """Capture all graphs of a model's steps, and compile what stands between them; yields the name of each before it begins.

    padding_step  (tokens, wanted rows, pages of a request, requests) -> inputs of a step
    width         pages of a request at most
    attention     a Step -> the kernels of attention in it
    """
    buckets = graphs.buckets
    for tokens in reversed(buckets.decode):
        yield f"decode {tokens}"
        graphs(padding_step(tokens, tokens, 1, tokens))
    # The largest first, which has all buckets of rows: what is behind the boundary is captured once for each. What is before it
    # is captured anew with each of those, so that they are compared once all are there.
    pairs = [
        (tokens, rows)
        for tokens in reversed(buckets.tokens)
        for rows in reversed(buckets.rows)
        if fitting(buckets.rows, min(rows, tokens - 1)) == rows
    ]
    steps = [(*pair, 1) for pair in [pair for pair in pairs if pair[0] == buckets.tokens[-1]] + pairs]
    for tokens, rows, requests in steps + mixed_steps(steps, graphs.requests, attention):
        yield f"{tokens} tokens, {rows} rows" + f" of {requests}" * (requests > 1)
        graphs(padding_step(tokens, min(rows, tokens - 1), min(-(-tokens // page_size), width), requests))


def mixed_steps(
    steps: Sequence[Step], requests: int, attention: Callable[[int, int, int], Iterable[Hashable]]
) -> list[Step]:  # fmt: skip
    """Those with more requests, up to so many, that have a kernel of attention which none before them has."""
    compiled = {kernel for step in steps for kernel in attention(*step)}
    found = []
    for tokens, rows, _ in steps:
        for count in range(2, min(tokens - 1, requests) + 1):
            kernels = compiled.union(attention(tokens, rows, count))
            if len(kernels) > len(compiled):
                found.append((tokens, rows, count))
                compiled = kernels
    return found


def capture_drafts(drafter: Drafter, sizes: Sequence[int], length: DraftLength) -> Iterator[str]:
    """The same of an assistant's.

    sizes   numbers of requests, ascending; a round takes the smallest that holds it
    length  says how many drafts rounds can have"""

    def padding(inputs: dict[str, Tensor]) -> None:
        inputs["hidden"].fill_(1)

    ranges = [(below + 1, size) for below, size in zip((0, *sizes), sizes, strict=False)]
    for fewest, size in reversed(ranges):
        for drafts in length.lengths(fewest, size):
            for draws in (False, True) if drafter.draws else (False,):
                yield f"draft {drafts} for {size}" + ", drawn" * draws
                drafter.draft_from(size, padding, drafts, draws)
