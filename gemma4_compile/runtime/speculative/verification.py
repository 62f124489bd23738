"""A round of multi-token prediction on the device: which drafts the target has confirmed, and the next ones. The host reads how
many were accepted when the next round runs already.

The sampler samples behind each draft as it would without drafts: logits, seed and place of a token are the same if all tokens
before it are. A draft that is the token sampled in its place is right, and the tokens up to the first that is wrong, with the
one sampled there, are those that the request would have got one by one: greedy or sampled, whatever the drafts. So it is with
greedy requests, and with all by VERIFICATIONS' "match". The others are rejection sampling (ops/sampling/verify.py): drafts of
sampled requests are drawn, more of them are accepted, and tokens are distributed as one by one, but are not those of the same
seed.

What a round is told of its R requests (`StepArrays.rounds`), each [R] int64:

    round_rows  of the state, see row_state.py
    requests    its place among the step's requests, whose page tables the drafter reads
    first       the first of its rows among the S sampled ones, which stand together
    counts      drafts that its other rows stand for: the first of those in the state
    states      the first of its rows among the N wanted ones
    room        tokens that it has pages for
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gemma4_compile.ops import verify
from gemma4_compile.ops.library import jit, power_of_two, tl
from gemma4_compile.packed.inputs import KINDS
from gemma4_compile.packed.row_state import ROUND, RowState

VERIFICATIONS = ("block", "token", "match")


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


def settle(
    state: RowState, tokens: Tensor, logits: Tensor, offsets: Tensor, step: Mapping[str, Tensor], block: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rejection sampling of a round's drafts: the step's tokens with what is accepted and what follows, [S], and how many
    drafts of each request are accepted, [R].

    tokens   [S]     sampled
    logits   [S, V]  with penalties and biases
    offsets  [S]     new tokens that each request has before it
    step     as of finish_round, with the sampling parameters
    """
    assert state.scores is not None
    rows, first = step["round_rows"], step["first"]
    drafts = state.drafts[rows]
    candidates = None if state.candidates is None else state.candidates[rows]
    temperature, top_k, top_p, min_p, seeds = (
        step[name][first] for name in ("temperature", "top_k", "top_p", "min_p", "seeds")
    )
    accepted, last = verify(
        logits, first, step["counts"], drafts, state.scores[rows], candidates, temperature, top_k, top_p, min_p, seeds,
        offsets[first], block,
    )  # fmt: skip
    place = torch.arange(drafts.shape[1], device=drafts.device)
    nowhere = len(tokens)
    found = torch.cat((tokens, tokens[:1]))
    found[torch.where(place < accepted[:, None], first[:, None] + place, nowhere)] = drafts
    found[first + accepted] = last
    return found[:nowhere], accepted


def finish_round(
    drafter: Drafts, state: RowState, tokens: Tensor, hidden: Tensor, step: Mapping[str, Tensor], drafts: int,
    accepted: Tensor | None = None, draws: bool = False,
) -> Tensor:  # fmt: skip
    """How many drafts of each request are accepted, [R]; its last token, the position of that and its next drafts go to the
    state. Nothing waits for the device.

    tokens    [S]     sampled
    hidden    [N, H]  final-normed states of the wanted rows
    step      `positions`, `rows` and page tables as the model saw them, and what a round is told
    drafts    how many to make
    accepted  where it is decided already
    draws     whether they are drawn, by the sampling parameters in `step`
    """
    if accepted is None:
        accepted = count_accepted(tokens, step["first"], verified_drafts(state, step))
    right, rows = accepted, step["round_rows"]
    if not drafts:
        advance(state, tokens, hidden, step, right)
        return accepted

    def fill(inputs: dict[str, Tensor]) -> None:
        advanced = _launch_advance if tokens.is_cuda else _advance_into
        advanced(state, tokens, hidden, step, right, inputs)
        if draws:
            for name in ("temperature", "seeds"):
                fill_rows(inputs[name], step[name][step["first"]])
            fill_rows(inputs["offsets"], state.positions[rows] + 1 - step["prompt_length"][step["first"]])

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


def verified_drafts(state: RowState, step: Mapping[str, Tensor]) -> Tensor:
    """The drafts that each request's rows stand for, [R, K] int64; -1 behind them."""
    drafts = state.drafts[step["round_rows"]]
    return torch.where(torch.arange(drafts.shape[1], device=drafts.device) < step["counts"][:, None], drafts, -1)


def count_accepted(tokens: Tensor, first: Tensor, drafts: Tensor) -> Tensor:
    """Leading drafts of each request that are the tokens sampled in their places, [R] int64."""
    places = first[:, None] + torch.arange(drafts.shape[1], device=drafts.device)
    # Behind a request's rows stand those of the next, or none: no token is -1.
    sampled = tokens[places.clamp(max=len(tokens) - 1)]
    return (sampled == drafts).long().cumprod(1).sum(1)


def advance(
    state: RowState, tokens: Tensor, hidden: Tensor, step: Mapping[str, Tensor], accepted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Take the accepted drafts into the state. Returns what drafting begins with: each request's last token [R], the hidden
    state [R, H] of the token before it, and the position of that [R]."""
    last, states = tokens[step["first"] + accepted], step["states"]
    reached = step["positions"][step["rows"][states]] + accepted
    state.last[step["round_rows"]] = last
    state.positions[step["round_rows"]] = reached + 1
    return last, hidden[states + accepted], torch.minimum(reached, step["room"] - 1)


def _advance_into(
    state: RowState, tokens: Tensor, hidden: Tensor, step: Mapping[str, Tensor], accepted: Tensor, out: dict[str, Tensor]
) -> None:  # fmt: skip
    found = dict(zip(("tokens", "hidden", "positions"), advance(state, tokens, hidden, step, accepted), strict=True))
    found |= {name: step[name][step["requests"]] for name in (f"table.{kind}" for kind in KINDS)}
    for name, rows in found.items():
        fill_rows(out[name], rows)


@jit
def _advance_kernel(
    tokens_ptr, hidden_ptr, positions_ptr, rows_ptr, table_a_ptr, table_b_ptr, round_rows_ptr, requests_ptr, first_ptr,
    states_ptr, room_ptr, accepted_ptr, last_ptr, reached_ptr, out_tokens_ptr, out_hidden_ptr, out_positions_ptr, out_a_ptr,
    out_b_ptr, requests, hidden_stride, a_stride, b_stride, out_stride, a_width, b_width, HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`advance` of one request, and its inputs put where the drafter reads them. Those behind the last request read position 0
    of page 0, which exists, and belong to nobody."""
    request = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = request < requests
    accepted = tl.load(accepted_ptr + request, real, other=0)
    state = tl.load(states_ptr + request, real, other=0)
    last = tl.load(tokens_ptr + tl.load(first_ptr + request, real, other=0) + accepted, real, other=0)
    reached = tl.load(positions_ptr + tl.load(rows_ptr + state, real, other=0), real, other=0) + accepted
    room = tl.load(room_ptr + request, real, other=1)
    row = tl.load(round_rows_ptr + request, real, other=0)
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
    state: RowState, tokens: Tensor, hidden: Tensor, step: Mapping[str, Tensor], accepted: Tensor, out: dict[str, Tensor]
) -> None:  # fmt: skip
    tables = [step[f"table.{kind}"] for kind in KINDS]
    outs = [out[f"table.{kind}"] for kind in KINDS]
    count, size = len(step["round_rows"]), out["tokens"].shape[0]
    _advance_kernel[(size,)](
        tokens, hidden, step["positions"], step["rows"], *tables, *(step[name] for name in ROUND if name != "counts"),
        accepted, state.last, state.positions, out["tokens"], out["hidden"], out["positions"], *outs, count,
        hidden.stride(0), tables[0].stride(0), tables[1].stride(0), outs[0].stride(0),
        *(min(table.shape[1], outs[0].shape[1]) for table in tables), hidden.shape[1],
        min(1024, power_of_two(hidden.shape[1])),
    )  # fmt: skip
