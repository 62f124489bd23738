"""Blocks of image tokens that see each other: no step may cut one, so one that no step holds is refused."""

from collections.abc import Sequence

from gemma4_compile.runtime.scheduling.pages import KVPages

from .spans import ImageSpan, blocks_of


def whole_blocks(images: Sequence[ImageSpan], most: int, pages: KVPages) -> list[tuple[int, int]]:
    """The blocks of a prompt's images, each (first, end).

    images  one or more
    most    tokens of a step
    pages   that it writes to

    Raises ValueError for a block longer than a step, or than sliding pages have room for beside the window before it."""
    found = blocks_of(images)
    longest = max(end - first for first, end in found)
    if longest > most:
        raise ValueError(
            f"an image's tokens must fit into a step of max_batched_tokens={most}, got {longest}; "
            "raise it, or give the image fewer (max_soft_tokens)"
        )
    room = {pages.pools[kind].pages * pages.page_size for kind, window in pages.windows.items() if window}
    window = max(pages.windows.values())
    if room and longest + window + pages.page_size > min(room):
        raise ValueError(
            f"an image's tokens and the window before them must fit into the sliding pool of {min(room)} tokens, "
            f"got {longest} and {window}; raise kv_bytes, or give the image fewer (max_soft_tokens)"
        )
    return found
