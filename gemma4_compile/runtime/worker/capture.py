"""Which CUDA graphs an engine has, and their capture before the first request."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from gemma4_compile.graphs.buckets import Buckets
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


def capture(
    graphs: GraphRunner, padding_step: Callable[[int, int, int], dict[str, Tensor]], width: int, page_size: int
) -> Iterator[str]:
    """Capture all graphs of a model's steps; yields the name of each before it begins.

    padding_step  (tokens, rows, pages of a request) -> inputs of a step
    width         pages of a request at most
    """
    buckets = graphs.buckets
    sizes = [(tokens, tokens) for tokens in reversed(buckets.decode)]
    largest = buckets.tokens[-1]
    sizes += [(largest, rows) for rows in reversed(buckets.rows) if rows < largest]
    sizes += [(tokens, buckets.rows[0]) for tokens in reversed(buckets.tokens[:-1]) if tokens > buckets.rows[0]]
    for tokens, rows in sizes:
        yield f"{tokens} tokens" if tokens != rows else f"decode {tokens}"
        graphs(padding_step(tokens, rows, min(-(-tokens // page_size), width) if tokens != rows else 1))


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
