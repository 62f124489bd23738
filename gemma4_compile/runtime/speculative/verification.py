"""A round of multi-token prediction on the device: which drafts the target has confirmed, and the next ones. The host reads how
many were accepted when the next round runs already.

The sampler samples behind each draft as it would without drafts: logits, seed and place of a token are the same if all tokens
before it are. A draft that is the token sampled in its place is right, and the tokens up to the first that is wrong, with the
one sampled there, are those that the request would have got one by one: greedy or sampled, whatever the drafts. So it is with
greedy requests, and with all by verification "match". The others are rejection sampling (ops/sampling/verify.py): drafts of
sampled requests are drawn, more of them are accepted, and tokens are distributed as one by one, but are not those of the same
seed.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gemma4_compile.ops import verify
from gemma4_compile.ops.library import jit, power_of_two, tl
from gemma4_compile.packed.inputs import KINDS
from gemma4_compile.packed.row_state import RowState
from gemma4_compile.packed.step_inputs import Speculation, StepInputs


class Drafted(NamedTuple):
    """tokens [R, drafts], and where they are drawn what RowState's scores and candidates are, [R, drafts, C]."""

    tokens: Tensor
    scores: Tensor | None = None
    candidates: Tensor | None = None


class Drafts(Protocol):
    """What drafts, see drafter.py."""

    def draft_from(
        self, count: int, fill: Callable[[dict[str, Tensor]], None], drafts: int | None = None, draws: bool = False
    ) -> Drafted:  # fmt: skip
        """So many drafts, K unless given, of each of so many requests, whose inputs `fill` writes; drawn or greedy."""


def reject(
    state: RowState, tokens: Tensor, logits: Tensor, offsets: Tensor, step: StepInputs[Tensor]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rejection sampling of a round's draft tokens: the step's tokens with what is accepted and what follows, [S], and how many
    of each request are accepted, [D].

    tokens   [S]     sampled
    logits   [S, V]  with penalties and biases
    offsets  [S]     new tokens that each request has before it
    """
    speculation, sampling = step.speculation, step.sampling
    assert state.scores is not None and speculation is not None and sampling is not None and sampling.shaping is not None
    rows, first, shaping = speculation.state_rows, speculation.first, sampling.shaping
    drafts = state.drafts[rows]
    candidates = None if state.candidates is None else state.candidates[rows]
    accepted, last = verify(
        logits, first, speculation.counts, drafts, state.scores[rows], candidates, shaping.temperature[first],
        shaping.top_k[first], shaping.top_p[first], shaping.min_p[first], shaping.seeds[first], offsets[first], True,
    )  # fmt: skip
    place = torch.arange(drafts.shape[1], device=drafts.device)
    nowhere = len(tokens)
    found = torch.cat((tokens, tokens[:1]))
    found[torch.where(place < accepted[:, None], first[:, None] + place, nowhere)] = drafts
    found[first + accepted] = last
    return found[:nowhere], accepted


def propose(
    drafter: Drafts, state: RowState, tokens: Tensor, hidden: Tensor, step: StepInputs[Tensor], drafts: int,
    accepted: Tensor | None = None, draws: bool = False,
) -> Tensor:  # fmt: skip
    """How many draft tokens of each request are accepted, [D]; its last token, the position of that and its next draft tokens
    go to the state. Nothing waits for the device.

    tokens    [S]     sampled
    hidden    [N, H]  final-normed states of the wanted rows
    step      positions, rows and tables as the model saw them
    drafts    how many to make
    accepted  where it is decided already
    draws     whether they are drawn, by the step's sampling
    """
    speculation, sampling = step.speculation, step.sampling
    assert speculation is not None
    rows, first = speculation.state_rows, speculation.first
    counts = accepted is None and tokens.is_cuda and drafts > 0  # the kernel that advances does
    if accepted is None:
        accepted = rows.new_empty(len(rows)) if counts else count_accepted(tokens, first, verified_drafts(state, speculation))
    right = accepted
    if not drafts:
        advance(state, tokens, hidden, step, right)
        return accepted

    def fill(inputs: dict[str, Tensor]) -> None:
        if tokens.is_cuda:
            _launch_advance(state, tokens, hidden, step, right, inputs, counts)
        else:
            _advance_into(state, tokens, hidden, step, right, inputs)
        if draws:
            assert sampling is not None and sampling.shaping is not None
            fill_rows(inputs["temperature"], sampling.shaping.temperature[first])
            fill_rows(inputs["seeds"], sampling.shaping.seeds[first])
            fill_rows(inputs["offsets"], state.positions[rows] + 1 - sampling.prompt_lengths[first])

    found = drafter.draft_from(len(rows), fill, drafts, draws)
    for kept, new in zip((state.drafts, state.scores, state.candidates), found, strict=True):
        if kept is not None and new is not None:
            kept[:, :drafts].index_copy_(0, rows, new)
    return accepted


def fill_rows(buffer: Tensor, rows: Tensor) -> None:
    """Put these first, as wide as they are, and zeros behind: requests that belong to nobody, and read position 0 of page 0,
    which exists."""
    here = buffer[: len(rows)]
    (here[:, : rows.shape[1]] if rows.dim() > 1 else here).copy_(rows)
    buffer[len(rows) :].zero_()


def verified_drafts(state: RowState, speculation: Speculation[Tensor]) -> Tensor:
    """The draft tokens that each request's rows stand for, [D, K] int64; -1 behind them."""
    drafts = state.drafts[speculation.state_rows]
    return torch.where(torch.arange(drafts.shape[1], device=drafts.device) < speculation.counts[:, None], drafts, -1)


def count_accepted(tokens: Tensor, first: Tensor, drafts: Tensor) -> Tensor:
    """Leading drafts of each request that are the tokens sampled in their places, [R] int64."""
    places = first[:, None] + torch.arange(drafts.shape[1], device=drafts.device)
    # Behind a request's rows stand those of the next, or none: no token is -1.
    sampled = tokens[places.clamp(max=len(tokens) - 1)]
    return (sampled == drafts).long().cumprod(1).sum(1)


def advance(
    state: RowState, tokens: Tensor, hidden: Tensor, step: StepInputs[Tensor], accepted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Take the accepted draft tokens into the state. Returns what drafting begins with: each request's last token [D], the
    hidden state [D, H] of the token before it, and the position of that [D]."""
    speculation = step.speculation
    assert speculation is not None
    last, wanted = tokens[speculation.first + accepted], speculation.wanted
    reached = step.positions[step.rows[wanted]] + accepted
    state.last[speculation.state_rows] = last
    state.positions[speculation.state_rows] = reached + 1
    return last, hidden[wanted + accepted], torch.minimum(reached, speculation.capacities - 1)


def _advance_into(
    state: RowState, tokens: Tensor, hidden: Tensor, step: StepInputs[Tensor], accepted: Tensor, out: dict[str, Tensor]
) -> None:  # fmt: skip
    assert step.speculation is not None
    found = dict(zip(("tokens", "hidden", "positions"), advance(state, tokens, hidden, step, accepted), strict=True))
    found |= {f"table.{kind}": step.tables[kind][step.speculation.requests] for kind in KINDS}
    for name, rows in found.items():
        fill_rows(out[name], rows)


@jit
def _advance_kernel(
    tokens_ptr, hidden_ptr, positions_ptr, rows_ptr, table_a_ptr, table_b_ptr, round_rows_ptr, requests_ptr, first_ptr,
    counts_ptr, states_ptr, room_ptr, drafts_ptr, accepted_ptr, last_ptr, reached_ptr, out_tokens_ptr, out_hidden_ptr,
    out_positions_ptr, out_a_ptr, out_b_ptr, requests, hidden_stride, a_stride, b_stride, out_stride, a_width, b_width,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, DRAFTS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """`advance` of one request, and its inputs put where the drafter reads them. Those behind the last request read position 0
    of page 0, which exists, and belong to nobody. COUNTS: `count_accepted` first, else `accepted` is given."""
    request = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = request < requests
    row = tl.load(round_rows_ptr + request, real, other=0)
    first = tl.load(first_ptr + request, real, other=0)
    if COUNTS:
        count = tl.load(counts_ptr + request, real, other=0)
        accepted = tl.full((), 0, tl.int64)
        running = real
        for j in tl.static_range(DRAFTS):
            running &= j < count
            draft = tl.load(drafts_ptr + row * DRAFTS + j, running, other=-1)
            running &= tl.load(tokens_ptr + first + j, running, other=-2) == draft
            accepted += running.to(tl.int64)
        tl.store(accepted_ptr + request, accepted, real)
    else:
        accepted = tl.load(accepted_ptr + request, real, other=0)
    state = tl.load(states_ptr + request, real, other=0)
    last = tl.load(tokens_ptr + first + accepted, real, other=0)
    reached = tl.load(positions_ptr + tl.load(rows_ptr + state, real, other=0), real, other=0) + accepted
    room = tl.load(room_ptr + request, real, other=1)
    tl.store(last_ptr + row, last, real)
    tl.store(reached_ptr + row, reached + 1, real)
    tl.store(out_tokens_ptr + request, last)
    tl.store(out_positions_ptr + request, tl.minimum(reached, room - 1))
    for start in range(0, HIDDEN, BLOCK):
        inside = start + column < HIDDEN
        given = tl.load(hidden_ptr + (state + accepted) * hidden_stride + start + column, inside & real, other=0.0)
        tl.store(out_hidden_ptr + request * HIDDEN + start + column, given, inside)
    source = tl.load(requests_ptr + request, real, other=0)
    for start in range(0, tl.maximum(a_width, b_width), BLOCK):
        place = start + column
        a = tl.load(table_a_ptr + source * a_stride + place, (place < a_width) & real, other=0)
        tl.store(out_a_ptr + request * out_stride + place, a, place < a_width)
        b = tl.load(table_b_ptr + source * b_stride + place, (place < b_width) & real, other=0)
        tl.store(out_b_ptr + request * out_stride + place, b, place < b_width)


def _launch_advance(
    state: RowState, tokens: Tensor, hidden: Tensor, step: StepInputs[Tensor], accepted: Tensor, out: dict[str, Tensor],
    counts: bool,
) -> None:  # fmt: skip
    """counts: `accepted` is written, not read."""
    speculation = step.speculation
    assert speculation is not None
    tables = [step.tables[kind] for kind in KINDS]
    outs = [out[f"table.{kind}"] for kind in KINDS]
    count, size = len(speculation.state_rows), out["tokens"].shape[0]
    _advance_kernel[(size,)](
        tokens, hidden, step.positions, step.rows, *tables, speculation.state_rows, speculation.requests, speculation.first,
        speculation.counts, speculation.wanted, speculation.capacities, state.drafts, accepted, state.last, state.positions,
        out["tokens"], out["hidden"], out["positions"], *outs, count, hidden.stride(0), tables[0].stride(0),
        tables[1].stride(0), outs[0].stride(0), *(min(table.shape[1], outs[0].shape[1]) for table in tables), hidden.shape[1],
        min(1024, power_of_two(hidden.shape[1])), state.drafts.shape[1], counts,
    )  # fmt: skip
