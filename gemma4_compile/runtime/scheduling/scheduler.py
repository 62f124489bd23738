"""Which tokens of which requests the next step computes: continuous batching, chunked prefill, preemption. Knows no tensor.

    decodes first    a request that writes waits for no prompt; what is left of the token budget goes to prompts, oldest first
    admission        in order of arrival, nobody is passed over; only with pages for all the tokens that the request has
    preemption       where a page is missing the youngest gives up its pages, and computes its tokens anew when it is its turn

So the oldest request always gets on, and each request is the oldest one day: nobody waits forever.

Steps overlap: a step is planned while the one before runs. A token that was sampled but has not reached the host is `pending`:
the plan counts it, the GPU reads it where it was written.

Drafts of a sequence are verified with its last token, as many as there is room for: no other waits or loses a page for them.
`computed` counts those that the host knows to be accepted. The next step is planned without knowing: it has pages for the case
that all were (`ahead`), and the device, which knows, says where it begins. Places of rejected drafts are written again.
"""

from bisect import insort
from collections.abc import Sequence as Tokens

import numpy as np

from .pages import KVPages
from .sequence import DecodeBatch, ScheduledChunk, Sequence


class Scheduler:
    """Plans steps over the pages of one engine.

    max_tokens  of a step
    max_rows    logits of prompts in a step, for requests that ask for them
    prefix_caching   whether prompts reuse the pages of a common prefix
    drafts      of each sequence that a step makes, and the next one verifies; may be set anew before any step
    """

    def __init__(self, pages: KVPages, max_tokens: int, max_rows: int = 256, prefix_caching: bool = True, drafts: int = 0):
        self.pages, self.max_tokens, self.max_rows, self.prefix_caching = pages, max_tokens, max_rows, prefix_caching
        self.drafts = drafts
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.preemptions = 0
        self._steady: DecodeBatch | None = None  # the step before, if the next one may be the same, a token further

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_number)

    def finish(self, sequence: Sequence, reason: str) -> None:
        """It needs nothing any more, wherever it was. Kernels that still write its pages run before any that reuse them."""
        sequence.finish_reason = reason
        if sequence.allocation is not None:
            self._steady = None
            self.pages.free(sequence.allocation)
            sequence.allocation = None
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> Tokens[ScheduledChunk]:
        """The next step, and at once its effect on all that is planned after it. Empty if nothing can be computed now."""
        again = self._again()
        if again is not None:
            self._steady = again
            return again
        scheduled = self._plan_step()
        self._steady = DecodeBatch.of(scheduled) if len(scheduled) == len(self.running) else None
        return self._steady or scheduled

    def _again(self) -> DecodeBatch | None:
        """The step before a token further, if nothing but pages has to be seen to: most steps, so no sequence is planned."""
        steady = self._steady
        if steady is None or self.waiting and self.pages.free_rows:
            return None
        scheduled = steady.advanced()
        if (scheduled.starts + 1 >= scheduled.ends).any() or not all(s.pending for s in scheduled.sequences):
            return None  # one has all its tokens, or the host knows what is to be computed
        for index in np.flatnonzero(scheduled.starts >= scheduled.capacities).tolist():
            allocation, start = scheduled.sequences[index].allocation, int(scheduled.starts[index])
            if allocation is None or self.pages.available_tokens(allocation, start) < 1:
                return None
            self.pages.extend(allocation, start + 1)
            scheduled.capacities[index] = allocation.capacity
        for sequence in scheduled.sequences:
            sequence.computed += 1
            sequence.pending += 1
        return scheduled

    def _plan_step(self) -> list[ScheduledChunk]:
        scheduled: list[ScheduledChunk] = []
        budget, rows, preempted = self.max_tokens, self.max_rows, self.preemptions
        prompts: list[Sequence] = []
        for sequence in list(self.running):
            allocation, todo = sequence.allocation, sequence.todo
            if todo != 1:
                prompts += [sequence] if todo else []
            elif allocation is not None and _reach(sequence) < allocation.capacity and sequence.params.prompt_logprobs is None:
                # Most steps of most requests, so written out: one token more, in a page that it has.
                ahead = sequence.ahead if sequence.placed else -1
                scheduled.append(ScheduledChunk(sequence, sequence.computed, 1, allocation.row, True, 0, 0, False, 0, ahead))
                sequence.computed += 1
                sequence.pending += 1
                sequence.placed = sequence.speculates
            elif more := self._continue(sequence, 1, rows, scheduled):
                rows -= more.prompt
        budget -= len(scheduled)
        budget -= self._add_drafts(scheduled, budget)
        for sequence in prompts:
            if more := self._continue(sequence, budget, rows, scheduled):
                budget, rows = budget - more.length, rows - more.prompt
            elif sequence.least > budget:
                budget = 0  # none may take the room that its image waits for
        while self.waiting and budget and self.preemptions == preempted:
            sequence = self.waiting[0]
            if sequence.wants_prompt_rows and rows < 1 or not self._admit(sequence):
                break
            todo = sequence.whole(min(sequence.todo, budget))
            if not todo:  # an image for which this step has no room
                self._give_back(sequence)
                break
            todo = self._fit(sequence, todo, rows, scheduled)
            assert todo, "who is admitted has room for a page"
            scheduled.append(self._plan(sequence, todo, begins=True))
            budget, rows = budget - todo, rows - scheduled[-1].prompt
        if self.drafts or any(w.drafts for w in scheduled):
            for w in scheduled:
                w.sequence.drafted = self.drafts if w.samples and w.sequence.speculates else 0
        return scheduled

    def _add_drafts(self, scheduled: list[ScheduledChunk], budget: int) -> int:
        """Let those who write verify drafts, as many as budget, limits and free pages allow; how many in all."""
        left = budget
        for index, w in enumerate(scheduled):
            sequence, allocation = w.sequence, w.sequence.allocation
            if w.ahead < 0 or allocation is None:
                continue
            # One token more than is accepted is sampled: the last that it may have is drafted for nothing.
            count = min(sequence.drafted, left, sequence.end - len(sequence.tokens) - sequence.pending)
            if (wanted := min(w.start + w.ahead + 1 + count, sequence.end)) > allocation.capacity:
                count = min(count, self.pages.available_tokens(allocation, w.start) - w.ahead - 1)
                wanted = min(wanted, w.start + w.ahead + 1 + count)
                self.pages.extend(allocation, wanted)
            if count:
                scheduled[index] = w._replace(length=1 + count, drafts=count)
                sequence.ahead += count
                left -= count
        return budget - left

    def _continue(self, sequence: Sequence, budget: int, rows: int, scheduled: list[ScheduledChunk]) -> ScheduledChunk | None:
        """Plan what fits of a running sequence, at the end of `scheduled`; None if nothing does."""
        todo = sequence.whole(min(sequence.todo, budget))
        if todo and sequence.allocation is not None:
            todo = self._fit(sequence, todo, rows, scheduled)
        if not todo or sequence.allocation is None:
            return None
        scheduled.append(self._plan(sequence, todo, begins=False))
        return scheduled[-1]

    def _fit(self, sequence: Sequence, todo: int, rows: int, scheduled: list[ScheduledChunk]) -> int:
        """Pages for as many of the tokens as can be had; preempts younger ones, and in the end the sequence itself, for the
        first. 0 if this step can do nothing for it."""
        allocation = sequence.allocation
        assert allocation is not None
        if sequence.wants_prompt_rows:  # those of an image are more at times
            todo = min(todo, max(sequence.whole(rows), sequence.least) if rows > 0 else 0)
        reach = _reach(sequence)
        if reach + todo <= allocation.capacity:
            return todo
        while (room := self.pages.available_tokens(allocation, sequence.computed)) < sequence.least:
            planned = {w.sequence for w in scheduled}
            victims = [s for s in self.running if s not in planned and s.number >= sequence.number]
            if victims[-1] is sequence and any(s.number > sequence.number for s in planned):
                return 0  # younger ones run in this step already: their pages come back when they end
            self._preempt(victims[-1])
            if victims[-1] is sequence:
                return 0
        todo = sequence.whole(min(todo, room - (reach - sequence.computed)))
        if todo < 1:
            return 0  # what it needs for sure is there: the rest once it is known how far it has come
        self.pages.extend(allocation, reach + todo)
        return todo

    def _plan(self, sequence: Sequence, count: int, begins: bool) -> ScheduledChunk:
        start, allocation = sequence.computed, sequence.allocation
        assert allocation is not None
        end = start + count
        prompt, prompt_from = 0, max(start, sequence.prompt_rows)
        if sequence.wants_prompt_rows:
            prompt = max(0, min(end, sequence.prompt_length - 1) - prompt_from)
            sequence.prompt_rows += prompt
        samples = end == len(sequence.tokens) + sequence.pending
        ahead = sequence.ahead if sequence.placed else -1
        sequence.computed = end
        sequence.pending += samples
        sequence.placed = samples and sequence.speculates
        if self.prefix_caching and count > 1:
            self.pages.cache(allocation, sequence.contents, end)
        return ScheduledChunk(sequence, start, count, allocation.row, samples, prompt, prompt_from, begins, 0, ahead)

    def _admit(self, sequence: Sequence) -> bool:
        """Give it a row, and the pages of a prefix that is there already; if all its tokens have room."""
        if sequence.pending or not self.pages.free_rows:
            return False
        reused = 0
        if self.prefix_caching and not sequence.wants_prompt_rows:
            sequence.keys = self.pages.keys(sequence.contents[:-1], sequence.keys)  # one token must be computed
            reused = self.pages.match(sequence.keys)
        free = self.pages.free_for(sequence.keys, reused)
        size = self.pages.page_size
        for kind, window in self.pages.windows.items():
            needed = -(-(len(sequence.tokens) + 1) // size) - reused
            if window:
                block = max((end - first for first, end in sequence.blocks), default=0)
                needed = min(needed, -(-(window + block) // size) + 1)
            if needed + len(self.running) > free[kind] and (self.running or needed > free[kind]):
                return False  # those that run need a page each before long
        sequence.allocation = self.pages.allocate(sequence.keys, reused)
        sequence.computed = reused * size
        if sequence.cached is None:
            sequence.cached = sequence.computed
        self.waiting.pop(0)
        insort(self.running, sequence, key=_number)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._give_back(sequence)
        sequence.preemptions += 1
        self.preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        """It waits again, without pages."""
        assert sequence.allocation is not None
        self._steady = None
        self.pages.free(sequence.allocation)
        sequence.allocation, sequence.computed, sequence.ahead, sequence.placed = None, 0, 0, False
        self.running.remove(sequence)
        self.add(sequence)

    def arrived(self, sequence: Sequence, tokens: Tokens[int], verified: int = 0) -> None:
        """The host has read what a step sampled for it: those of its `verified` drafts that were accepted, and a token more."""
        sequence.pending -= 1
        if sequence.allocation is not None:  # preempted meanwhile, it computes them all anew
            sequence.computed += len(tokens) - 1
            sequence.ahead -= verified
        sequence.tokens.extend(tokens)
        allocation = sequence.allocation
        if allocation is not None and self.prefix_caching and len(sequence.tokens) // self.pages.page_size > allocation.cached:
            self.pages.cache(allocation, sequence.contents, sequence.computed)

    def check(self) -> None:
        """Raises AssertionError if an invariant of the scheduler or of its pages is broken."""
        self.pages.check()
        held = {id(allocation) for allocation in self.pages.allocations.values()}
        assert {id(s.allocation) for s in self.running} == held, "rows are of running ones"
        assert all(s.allocation is None and not s.placed and not s.ahead for s in self.waiting), "who waits holds nothing"
        for queue in (self.running, self.waiting):
            assert queue == sorted(queue, key=_number), "first come, first served"
        for s in self.running:
            known = len(s.tokens) + s.pending
            assert s.computed <= known, f"sequence {s.number} has computed {s.computed} of {known} tokens"
            assert not s.placed or s.speculates, f"sequence {s.number} has drafts, which nobody made for it"
            assert s.ahead >= 0 and (s.pending or not s.ahead), f"sequence {s.number}: {s.ahead} drafts in {s.pending} steps"
            reach = min(s.computed + s.ahead, s.end)
            assert s.allocation is not None and reach <= s.allocation.capacity, f"sequence {s.number} lacks a page"


def _reach(sequence: Sequence) -> int:
    """The furthest position that its next token may have; tokens behind its end are nobody's, and are stored nowhere."""
    return min(sequence.computed + sequence.ahead, sequence.end - 1) if sequence.ahead else sequence.computed


def _number(sequence: Sequence) -> int:
    return sequence.number
