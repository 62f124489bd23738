"""A planned step as arrays: what the model reads (see batch.py), and where the sampler finds rows and state."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .batch import KINDS
from .pages import KVPages
from .work import Decodes, Work

Array = np.ndarray


@dataclass(frozen=True)
class StepArrays:
    """One step on the host.

    model      the inputs of batch.py by name, but for keys and values
    sources    [T] int64   row whose last sampled token stands for this one, -1 where input_ids has it
    sampled    [S] int64   which of the wanted rows a token is sampled from
    targets    [S] int64   row of the sampler's state of each
    lengths    [S] int64   tokens of the request before the new one, drafts included
    carried    whether any token comes from the sampler's state
    prompt_rows, prompt_next   [P] int64: rows that want the log probability of the prompt's next token, and that token;
               None if there are none
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
    rounds: dict[str, Array] = field(default_factory=dict)


def build(work: Sequence[Work], pages: KVPages, speculative: int = 0) -> StepArrays:
    """The arrays of a step as planned; no loop over tokens. `speculative` is how many drafts a request gets at most."""
    size = pages.page_size
    if isinstance(work, Decodes):
        count = len(work)
        first, rows, samples, prompts = work.starts, work.rows, np.ones(count, bool), np.zeros(count, bool)
        starts, counts, wanted = np.arange(count + 1, dtype=np.int32), samples, samples.astype(np.int64)
    else:
        columns = [np.array(column) for column in list(zip(*work, strict=True))[1:]]
        (first, counts, rows, samples, prompts), drafts = columns[:5], columns[-1]
        wanted = np.where(samples, drafts + 1, 0)  # tokens sampled of each
        starts = np.zeros(len(work) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
    total = int(starts[-1])
    ends = starts[1:] - 1  # the last token of each
    ids = np.zeros(total, np.int64)
    if isinstance(work, Decodes):
        positions, row_of, sources = first, rows, rows
    else:
        positions = np.arange(total) + np.repeat(first - starts[:-1], counts)
        row_of = np.repeat(rows, counts)
        sources = np.full(total, -1, np.int64)
        for w, begin in zip(work, starts, strict=False):
            given = w.sequence.tokens[w.start : w.start + w.length]
            given += w.sequence.drafts[: w.drafts]
            ids[begin : begin + len(given)] = given
            sources[begin + len(given) : begin + w.length] = w.row  # one at most: the token sampled last

    model: dict[str, Array] = {"input_ids": ids[None], "positions": positions, "starts": starts}
    page, offset = positions // size, positions % size
    width = int(positions[ends].max()) // size + 1
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
    rounds = _rounds(work, model, which, wanted, speculative) if speculative else {}
    return StepArrays(model, sources, which, targets, lengths, carried_any, prompt_rows, prompt_next, rounds)


def _last(ends: Array, counts: Array) -> Array:
    """For each that ends there its last so many tokens: [sum of counts] int64, ascending."""
    before = np.cumsum(counts) - counts
    return np.repeat(ends - counts + 1 - before, counts) + np.arange(int(counts.sum()))


def _rounds(work: Sequence[Work], model: dict[str, Array], which: Array, wanted: Array, speculative: int) -> dict[str, Array]:
    """What verification and drafting need of the requests that get drafts."""
    chosen = np.array([i for i, w in enumerate(work) if w.samples and w.sequence.speculates], np.int64)
    if not len(chosen):
        return {}
    drafts = np.full((len(chosen), speculative), -1, np.int64)
    for row, index in zip(drafts, chosen.tolist(), strict=True):
        row[: work[index].drafts] = work[index].sequence.drafts[: work[index].drafts]
    first = (np.cumsum(wanted) - wanted)[chosen]
    found = {"first": first, "drafts": drafts, "states": which[first]}
    found["positions"] = model["positions"][model["rows"][which[first]]]
    return found | {f"table.{kind}": model[f"table.{kind}"][chosen] for kind in KINDS}


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
