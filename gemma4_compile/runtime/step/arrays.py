"""A planned step as arrays: what the model reads (see batch.py), and where the sampler finds rows and state."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gemma4_compile.packed.inputs import KINDS
from gemma4_compile.runtime.scheduling.pages import KVPages
from gemma4_compile.runtime.scheduling.sequence import Decodes, Work

Array = np.ndarray


@dataclass(frozen=True)
class StepArrays:
    """One step on the host.

    model      the inputs of batch.py by name, but for keys and values
    sources    [T] int64   row of the device's state that this token comes from, -1 where input_ids has it
    sampled    [S] int64   which of the wanted rows a token is sampled from
    targets    [S] int64   row of the sampler's state of each
    lengths    [S] int64   tokens of the request before the new one, drafts included; at least
    carried    whether any token comes from the sampler's state
    prompt_rows, prompt_next   [P] int64: rows that want the log probability of the prompt's next token, and that token;
               None if there are none
    placed     where tokens stand whose positions the device knows, see row_state.py; empty if there are none. Their positions
               and slots in `model` are the lowest that they can have
    rounds     of the requests that get drafts, see mtp.py; empty if none does
    """

    model: dict[str, Array]
    sources: Array
    sampled: Array
    targets: Array
    lengths: Array
    carried: bool
    prompt_rows: Array | None = None
    prompt_next: Array | None = None
    placed: dict[str, Array] = field(default_factory=dict)
    rounds: dict[str, Array] = field(default_factory=dict)


def build(work: Sequence[Work], pages: KVPages) -> StepArrays:
    """The arrays of a step as planned; no loop over tokens."""
    size = pages.page_size
    if isinstance(work, Decodes):
        count = len(work)
        first, rows, samples, prompts = work.starts, work.rows, np.ones(count, bool), np.zeros(count, bool)
        starts, counts, wanted = np.arange(count + 1, dtype=np.int32), samples, samples.astype(np.int64)
    else:
        columns = [np.array(column) for column in list(zip(*work, strict=True))[1:]]
        (first, counts, rows, samples, prompts), (drafts, ahead) = columns[:5], columns[-2:]
        wanted = np.where(samples, drafts + 1, 0)  # tokens sampled of each
        starts = np.zeros(len(work) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
    total = int(starts[-1])
    ends = starts[1:] - 1  # the last token of each
    ids = np.zeros(total, np.int64)
    placed: dict[str, Array] = {}
    furthest = 0
    if isinstance(work, Decodes):
        positions, row_of, sources = first, rows, rows
    else:
        positions = np.arange(total) + np.repeat(first - starts[:-1], counts)
        row_of = np.repeat(rows, counts)
        sources = np.full(total, -1, np.int64)
        for w, begin in zip(work, starts, strict=False):
            given = w.sequence.tokens[w.start : w.start + w.length] if w.ahead < 0 else []
            ids[begin : begin + len(given)] = given
            sources[begin + len(given) : begin + w.length] = w.row  # the token sampled last, and drafts
        if (ahead >= 0).any():
            capacities = np.array([pages.holdings[row].capacity for row in rows.tolist()])
            furthest = int((np.minimum(first + counts + ahead, capacities) * (ahead >= 0)).max()) - 1
            places = np.where(np.repeat(ahead >= 0, counts), np.arange(total) - np.repeat(starts[:-1], counts), -1)
            placed = {"places": places, "owners": np.repeat(np.arange(len(work)), counts)}
            placed["capacities"] = np.repeat(capacities, counts)

    model: dict[str, Array] = {"input_ids": ids[None], "positions": positions, "starts": starts}
    page, offset = positions // size, positions % size
    width = max(int(positions[ends].max()), furthest) // size + 1
    for kind in KINDS:
        if kind in pages.tables:
            table = pages.tables[kind]
            model[f"slots.{kind}"] = table[row_of, page].astype(np.int64) * size + offset
            model[f"table.{kind}"] = table[rows, :width]
        else:  # no layer of this kind: nothing is stored, nothing read
            model[f"slots.{kind}"] = np.full(total, -1, np.int64)
            model[f"table.{kind}"] = np.zeros((len(work), 1), np.int32)

    prompt_rows = prompt_next = None
    if prompts.any():
        model["rows"], which, prompt_rows, prompt_next = _rows_with_prompts(work, starts)
    else:
        model["rows"] = _last(ends, wanted)
        which = np.arange(len(model["rows"]))
    lengths = positions[model["rows"][which]] + 1
    if not len(model["rows"]):  # amid prompts: a model makes logits of one row at least
        model["rows"] = np.array([total - 1])
    carried_any = bool((sources >= 0).any())
    targets = np.repeat(rows, wanted)
    rounds = {} if isinstance(work, Decodes) else _rounds(work, pages, which, wanted)
    return StepArrays(model, sources, which, targets, lengths, carried_any, prompt_rows, prompt_next, placed, rounds)


def _last(ends: Array, counts: Array) -> Array:
    """For each that ends there its last so many tokens: [sum of counts] int64, ascending."""
    before = np.cumsum(counts) - counts
    return np.repeat(ends - counts + 1 - before, counts) + np.arange(int(counts.sum()))


def _rounds(work: Sequence[Work], pages: KVPages, which: Array, wanted: Array) -> dict[str, Array]:
    """What verification and drafting need of the requests that get drafts."""
    chosen = [i for i, w in enumerate(work) if w.samples and w.sequence.speculates]
    if not chosen:
        return {}
    first = (np.cumsum(wanted) - wanted)[chosen]
    rows = [work[i].row for i in chosen]
    found = {"round_rows": rows, "requests": chosen, "first": first, "counts": [work[i].drafts for i in chosen]}
    found |= {"states": which[first], "room": [pages.holdings[row].capacity for row in rows]}
    return {name: np.asarray(values, np.int64) for name, values in found.items()}


def _rows_with_prompts(work: Sequence[Work], starts: Array) -> tuple[Array, Array, Array, Array]:
    """Wanted rows, which of them are sampled, which are the prompts', and the tokens that follow those in the prompt."""
    wanted: list[int] = []
    sampled: list[int] = []
    prompt_rows: list[int] = []
    following: list[int] = []
    for w, begin in zip(work, starts.tolist(), strict=False):
        first = begin + w.prompt_from - w.start
        prompt_rows += range(len(wanted), len(wanted) + w.prompt)
        wanted += range(first, first + w.prompt)
        following += w.sequence.tokens[w.prompt_from + 1 : w.prompt_from + 1 + w.prompt]
        sampled += range(len(wanted), len(wanted) + w.sampled)
        wanted += range(begin + w.length - w.sampled, begin + w.length)
    rows, which, of_prompt, after = (np.array(values, np.int64) for values in (wanted, sampled, prompt_rows, following))
    return rows, which, of_prompt, after
