"""What the scheduler plans with: a sequence, its share of a step, and the usual step, in which each writes one token more."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, overload

import numpy as np

from gemma4_compile.runtime.constraint import Constraint
from gemma4_compile.runtime.sampling_params import SamplingParams
from gemma4_compile.runtime.vision.spans import ImageSpan, contents

from .pages import Allocation


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request on its way through the scheduler.

    number        order of arrival
    tokens        prompt and new tokens that the host knows
    limit         new tokens at most
    stops         tokens that end it
    plain         nobody reads its tokens before it ends
    computed      tokens whose keys and values are in place when the steps planned so far have run; at least, where drafts are
                  among them that the host does not know to be accepted
    pending       steps among them that sample a token, or more, which the host does not know yet
    prompt_rows   prompt tokens whose log probabilities have been asked for
    speculates    whether tokens are drafted for it
    placed        whether the device has its last token and the position of that
    drafted       drafts to follow it that the device has
    constraint    says which tokens may come; None: all
    images        where they stand in the prompt
    blocks        runs of image tokens that see each other, each (first, end): no chunk ends within one
    ahead         drafts that steps verify whose results the host does not know yet: so many tokens more may be computed
    """

    number: int
    tokens: list[int]
    params: SamplingParams
    limit: int
    seed: int = 0
    request: Any = None
    stops: frozenset[int] = frozenset()
    plain: bool = False
    speculates: bool = False
    constraint: Constraint | None = None
    images: tuple[ImageSpan, ...] = ()
    blocks: list[tuple[int, int]] = field(default_factory=list)
    placed: bool = False
    drafted: int = 0
    ahead: int = 0
    prompt_length: int = 0
    computed: int = 0
    pending: int = 0
    prompt_rows: int = 0
    cached: int | None = None  # prompt tokens reused when it was first admitted
    preemptions: int = 0
    finish_reason: str | None = None
    allocation: Allocation | None = None
    keys: list[bytes] = field(default_factory=list)
    _prompt_contents: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_length = self.prompt_length or len(self.tokens)
        if self.images:
            self._prompt_contents = contents(self.tokens[: self.prompt_length], self.images)

    @property
    def contents(self) -> list[int]:
        """What prefixes are compared by: its tokens, and what its images show."""
        return [*self._prompt_contents, *self.output] if self.images else self.tokens

    def whole(self, count: int) -> int:
        """So many of the next tokens, or fewer, that no block is cut; 0 if that leaves none."""
        end = self.computed + count
        for first, last in self.blocks:
            if first < end < last:
                end = first
        return max(0, end - self.computed)

    @property
    def least(self) -> int:
        """The fewest next tokens that cut no block."""
        return next((end - self.computed for first, end in self.blocks if first <= self.computed < end), 1)

    @property
    def todo(self) -> int:
        """Tokens that could be computed now, without drafts; 0 if all tokens it may have are sampled."""
        known = len(self.tokens) + self.pending
        return known - self.computed if known - self.prompt_length < self.limit else 0

    @property
    def end(self) -> int:
        """Tokens that it may have."""
        return self.prompt_length + self.limit

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def wants_prompt_rows(self) -> bool:
        return self.params.prompt_logprobs is not None and self.prompt_rows < self.prompt_length - 1


class ScheduledChunk(NamedTuple):
    """One sequence's share of a step: tokens start to start + length, all later by the drafts accepted meanwhile (`ahead`).

    row        of the page tables and of the sampler's state
    samples    whether a new token is sampled behind them
    prompt     how many of them want the log probabilities of the prompt's next token, from `prompt_from` on
    begins     whether this is the row's first step
    drafts     how many of its last tokens are drafts, which the device has. A token is sampled behind each, and behind the
               token before them
    ahead      how many drafts may have been accepted in steps that the host has not read; the device knows. -1: it takes no
               position from there, and no draft
    """

    sequence: Sequence
    start: int
    length: int
    row: int
    samples: bool
    prompt: int
    prompt_from: int
    begins: bool
    drafts: int = 0
    ahead: int = -1

    @property
    def sampled(self) -> int:
        """Tokens sampled in it."""
        return self.drafts + 1 if self.samples else 0


@dataclass(frozen=True)
class DecodeBatch(Tokens[ScheduledChunk]):
    """A step in which each sequence computes the token that the step before has sampled, which the host need not know.

    The arrays are those of the sequences in order, so that a step of many is planned, sent and taken in without a loop over
    them; whoever wants the shares one by one has them too.

    rows        of the page tables
    starts      the position computed
    capacities  tokens that each has pages for
    ends        position at which a sequence has all the tokens that it may have
    plain       nobody reads their tokens before they end
    stops       all tokens that end any of them
    """

    sequences: list[Sequence]
    rows: np.ndarray
    starts: np.ndarray
    capacities: np.ndarray
    ends: np.ndarray
    plain: bool
    stops: frozenset[int]

    @classmethod
    def of(cls, scheduled: Tokens[ScheduledChunk]) -> "DecodeBatch | None":
        """These shares, if that is what they are."""
        if not scheduled or not all(
            w.length == 1 and w.samples and w.start >= len(w.sequence.tokens) and w.ahead < 0 for w in scheduled
        ):
            return None
        sequences = [w.sequence for w in scheduled]
        if any(s.speculates or s.params.prompt_logprobs is not None for s in sequences):
            return None
        rows, starts = np.array([w.row for w in scheduled]), np.array([w.start for w in scheduled])
        capacities = np.array([s.allocation.capacity if s.allocation else 0 for s in sequences])
        ends = np.array([s.end for s in sequences])
        plain = all(s.plain for s in sequences)
        return cls(sequences, rows, starts, capacities, ends, plain, frozenset().union(*{s.stops for s in sequences}))

    def advanced(self) -> "DecodeBatch":
        """The same, one token further."""
        return replace(self, starts=self.starts + 1, capacities=self.capacities.copy())

    def __len__(self) -> int:
        return len(self.sequences)

    @overload
    def __getitem__(self, index: int) -> ScheduledChunk: ...
    @overload
    def __getitem__(self, index: slice) -> list[ScheduledChunk]: ...
    def __getitem__(self, index: int | slice) -> ScheduledChunk | list[ScheduledChunk]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return ScheduledChunk(self.sequences[index], int(self.starts[index]), 1, int(self.rows[index]), True, 0, 0, False)
