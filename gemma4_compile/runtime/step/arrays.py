"""A planned step as arrays: what the model reads, and where the sampler finds rows and state."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gemma4_compile.packed.inputs import KINDS
from gemma4_compile.packed.step_inputs import ImageTokens, Placement, PromptRows, Speculation, StepInputs
from gemma4_compile.runtime.scheduling.pages import KVPages
from gemma4_compile.runtime.scheduling.sequence import DecodeBatch, ScheduledChunk
from gemma4_compile.runtime.vision.spans import Patches

Array = np.ndarray


class ImagePart(NamedTuple):
    """Embeddings `first` to `end` of an image, which a step reads from its token `row` on."""

    image: Patches
    first: int
    end: int
    row: int


def image_parts(scheduled: Sequence[ScheduledChunk]) -> list[ImagePart]:
    """The images that a step computes tokens of, in order."""
    if isinstance(scheduled, DecodeBatch) or not any(w.sequence.images for w in scheduled):
        return []
    return list(_image_parts(scheduled))


def _image_parts(scheduled: Sequence[ScheduledChunk]) -> Iterator[ImagePart]:
    row = 0
    for w in scheduled:
        for span in w.sequence.images:
            first, end = max(span.start, w.start), min(span.end, w.start + w.length)
            if first < end:
                yield ImagePart(span.image, first - span.start, end - span.start, row + first - w.start)
        row += w.length


def build(scheduled: Sequence[ScheduledChunk], pages: KVPages, pad_token: int = 0) -> StepInputs[Array]:
    """The arrays of a step as planned, but for its sampling; no loop over tokens.

    pad_token   stands in the places of images
    """
    size = pages.page_size
    if isinstance(scheduled, DecodeBatch):
        count = len(scheduled)
        first, rows, samples, prompts_wanted = scheduled.starts, scheduled.rows, np.ones(count, bool), np.zeros(count, bool)
        starts, counts, wanted = np.arange(count + 1, dtype=np.int32), samples, samples.astype(np.int64)
    else:
        columns = [np.array(column) for column in list(zip(*scheduled, strict=True))[1:]]
        (first, counts, rows, samples, prompts_wanted), (drafts, ahead) = columns[:5], columns[-2:]
        wanted = np.where(samples, drafts + 1, 0)  # tokens sampled of each
        starts = np.zeros(len(scheduled) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
    total = int(starts[-1])
    ends = starts[1:] - 1  # the last token of each
    ids = np.zeros(total, np.int64)
    placement, furthest = None, 0
    if isinstance(scheduled, DecodeBatch):
        positions, row_of, sources = first, rows, rows
    else:
        positions = np.arange(total) + np.repeat(first - starts[:-1], counts)
        row_of = np.repeat(rows, counts)
        sources = np.full(total, -1, np.int64)
        for w, begin in zip(scheduled, starts, strict=False):
            given = w.sequence.tokens[w.start : w.start + w.length] if w.ahead < 0 else []
            ids[begin : begin + len(given)] = given
            sources[begin + len(given) : begin + w.length] = w.row  # the token sampled last, and drafts
        if (ahead >= 0).any():
            capacities = np.array([pages.allocations[row].capacity for row in rows.tolist()])
            furthest = int((np.minimum(first + counts + ahead, capacities) * (ahead >= 0)).max()) - 1
            places = np.where(np.repeat(ahead >= 0, counts), np.arange(total) - np.repeat(starts[:-1], counts), -1)
            placement = Placement(places, np.repeat(np.arange(len(scheduled)), counts), np.repeat(capacities, counts))

    images = _images(scheduled, positions)
    if images is not None:
        ids[images.rows] = pad_token

    slots, tables = {}, {}
    page, offset = positions // size, positions % size
    width = max(int(positions[ends].max()), furthest) // size + 1
    for kind in KINDS:
        if kind in pages.tables:
            table = pages.tables[kind]
            slots[kind] = table[row_of, page].astype(np.int64) * size + offset
            tables[kind] = table[rows, :width]
        else:  # no layer of this kind: nothing is stored, nothing read
            slots[kind] = np.full(total, -1, np.int64)
            tables[kind] = np.zeros((len(scheduled), 1), np.int32)

    wanted_rows, prompts = _rows_with_prompts(scheduled, starts) if prompts_wanted.any() else (_last(ends, wanted), None)
    sampled = np.arange(len(wanted_rows)) if prompts is None else prompts.sampled
    if not len(wanted_rows):  # amid prompts: a model makes logits of one row at least
        wanted_rows = np.array([total - 1])
    return StepInputs(
        ids[None], positions, wanted_rows, starts, slots, tables, targets=np.repeat(rows, wanted),
        sources=sources if (sources >= 0).any() else None, placement=placement,
        speculation=None if isinstance(scheduled, DecodeBatch) else _speculation(scheduled, pages, sampled, wanted),
        prompts=prompts, images=images,
    )  # fmt: skip


def _images(scheduled: Sequence[ScheduledChunk], positions: Array) -> ImageTokens[Array] | None:
    parts = image_parts(scheduled)
    if not parts:
        return None
    until, row = positions.astype(np.int32), 0
    for w in scheduled:
        for first, end in w.sequence.blocks:
            begin = max(first, w.start)
            if begin < min(end, w.start + w.length):  # to its end: no chunk cuts it
                until[row + begin - w.start : row + end - w.start] = end - 1
        row += w.length
    return ImageTokens(np.concatenate([np.arange(p.row, p.row + p.end - p.first) for p in parts]), until)


def _last(ends: Array, counts: Array) -> Array:
    """For each that ends there its last so many tokens: [sum of counts] int64, ascending."""
    before = np.cumsum(counts) - counts
    return np.repeat(ends - counts + 1 - before, counts) + np.arange(int(counts.sum()))


def _speculation(
    scheduled: Sequence[ScheduledChunk], pages: KVPages, sampled: Array, wanted: Array
) -> Speculation[Array] | None:
    """What verification and drafting need of the requests that get draft tokens; None if none does."""
    chosen = [i for i, w in enumerate(scheduled) if w.samples and w.sequence.speculates]
    if not chosen:
        return None
    first = (np.cumsum(wanted) - wanted)[chosen]
    rows = [scheduled[i].row for i in chosen]
    counts, capacities = [scheduled[i].drafts for i in chosen], [pages.allocations[row].capacity for row in rows]
    return Speculation(*(np.asarray(each, np.int64) for each in (rows, chosen, first, counts, sampled[first], capacities)))


def _rows_with_prompts(scheduled: Sequence[ScheduledChunk], starts: Array) -> tuple[Array, PromptRows[Array]]:
    """Wanted rows, and which of them are the prompts' own."""
    wanted: list[int] = []
    sampled: list[int] = []
    prompt_rows: list[int] = []
    following: list[int] = []
    for w, begin in zip(scheduled, starts.tolist(), strict=False):
        first = begin + w.prompt_from - w.start
        prompt_rows += range(len(wanted), len(wanted) + w.prompt)
        wanted += range(first, first + w.prompt)
        following += w.sequence.tokens[w.prompt_from + 1 : w.prompt_from + 1 + w.prompt]
        sampled += range(len(wanted), len(wanted) + w.sampled)
        wanted += range(begin + w.length - w.sampled, begin + w.length)
    rows, *prompts = (np.array(values, np.int64) for values in (wanted, prompt_rows, following, sampled))
    return rows, PromptRows(*prompts)
