"""A device that stores, in the place of a key, a digest of its token and all before it. So a step tells at once whether each
request reads what is its own: through page tables, reused prefixes, freed pages and tokens that never came to the host."""

import random
from collections import deque
from collections.abc import Sequence as Tokens
from hashlib import blake2b

import numpy as np
import torch

from gemma4_compile.packed.row_state import RowState
from gemma4_compile.packed.step_inputs import StepInputs
from gemma4_compile.runtime.scheduling.pages import KVPages
from gemma4_compile.runtime.scheduling.scheduler import Scheduler
from gemma4_compile.runtime.scheduling.sequence import ScheduledChunk, Sequence
from gemma4_compile.runtime.speculative.verification import advance, count_accepted, verified_drafts
from gemma4_compile.runtime.step import invariants
from gemma4_compile.runtime.step.arrays import build
from gemma4_compile.runtime.step.staging import Staging

VOCABULARY = 11


def follow(digest: int, token: int) -> int:
    return int.from_bytes(blake2b(f"{digest} {token}".encode(), digest_size=7).digest(), "big")


def choose(digest: int) -> int:
    """The "model": the token that comes after a text."""
    return digest % VOCABULARY


def expected(prompt: list[int], count: int) -> list[int]:
    digest, tokens = 0, []
    for token in prompt:
        digest = follow(digest, token)
    for _ in range(count):
        tokens.append(choose(digest))
        digest = follow(digest, tokens[-1])
    return tokens


class FakeDevice:
    """Runs a scheduler's steps, `depth` of them ahead of what the host knows.

    speculative   drafts of a round; each is the right token with probability `luck`
    """

    def __init__(
        self, pages: KVPages, scheduler: Scheduler, rows: int, depth: int, speculative: int = 0, luck: float = 0.5
    ):  # fmt: skip
        self.pages, self.scheduler, self.depth = pages, scheduler, depth
        self.speculative, self.luck, self.chooser = speculative, luck, random.Random(0)
        self.drafted = self.accepted = 0
        self.memory = {kind: np.zeros(pool.pages * pages.page_size, np.int64) for kind, pool in pages.pools.items()}
        self.state = RowState.empty(rows, speculative, torch.device("cpu"))
        self.running: deque[tuple[Tokens[ScheduledChunk], list[int], list[int]]] = deque()
        self.steps = 0

    def step(self) -> Tokens[ScheduledChunk]:
        """Plan and run a step; the host learns of the one `depth` before. Returns the plan."""
        scheduled = self.scheduler.schedule()
        self.scheduler.check()
        if scheduled:
            self.running.append((scheduled, *self._run(scheduled)))
            self.steps += 1
        while len(self.running) > (self.depth if scheduled else 0):
            self._arrive(*self.running.popleft())
        self.scheduler.check()
        return scheduled

    def _run(self, scheduled: Tokens[ScheduledChunk]) -> tuple[list[int], list[int]]:
        planned = build(scheduled, self.pages)
        invariants.check_step(scheduled, planned, self.pages, VOCABULARY)
        size = self.pages.page_size
        step = self.state.resolve(Staging(torch.device("cpu")).send(planned), size)
        model = {name: tensor.numpy() for name, tensor in step.model().items()}
        ids = model["input_ids"][0]
        digests = np.zeros(len(ids), np.int64)
        tables = {kind: model[f"table.{kind}"] for kind in self.pages.pools}
        # Pages that a request fills may be read by another one of the same step: all are written before any is read. The
        # owner of a page stands before those that share it.
        for index in range(len(scheduled)):
            for token in range(model["starts"][index], model["starts"][index + 1]):
                place = int(model["positions"][token])
                before = 0
                if place:
                    page = tables["full_attention"][index, (place - 1) // size]
                    before = int(self.memory["full_attention"][page * size + (place - 1) % size])
                digests[token] = follow(before, int(ids[token]))
                for kind in self.pages.pools:
                    if (slot := model[f"slots.{kind}"][token]) >= 0:
                        self.memory[kind][slot] = digests[token]
        for index in range(len(scheduled)):
            self._check_windows(index, model, tables)
        rows = model["rows"] if planned.prompts is None else model["rows"][planned.prompts.sampled]
        chosen = [choose(int(digests[row])) for row in rows[: len(planned.targets)]]
        self.state.last[planned.targets] = torch.tensor(chosen, dtype=torch.int64)
        return chosen, self._draft(chosen, digests[model["rows"]], step) if planned.speculation else []

    def _draft(self, chosen: list[int], digests: np.ndarray, step: StepInputs[torch.Tensor]) -> list[int]:
        """How many drafts of each request are right. The next ones are the truth or a token at random."""
        tokens, speculation = torch.tensor(chosen), step.speculation
        assert speculation is not None
        accepted = count_accepted(tokens, speculation.first, verified_drafts(self.state, speculation))
        last, texts, reached = advance(self.state, tokens, torch.from_numpy(digests)[:, None], step, accepted)
        stored = step.slots["full_attention"][step.rows[speculation.wanted + accepted]] >= 0
        for request, row in enumerate(speculation.state_rows.tolist()):
            digest, token = int(texts[request]), int(last[request])
            if stored[request]:  # behind its room it has ended
                tables = {kind: table[speculation.requests[request]].numpy() for kind, table in step.tables.items()}
                self._check_drafter_reads(tables, int(reached[request]), digest)
            for draft in range(self.speculative):
                digest = follow(digest, token)
                token = choose(digest) if self.chooser.random() < self.luck else self.chooser.randrange(VOCABULARY)
                self.state.drafts[row, draft] = token
        return accepted.tolist()

    def _check_drafter_reads(self, tables: dict[str, np.ndarray], end: int, digest: int) -> None:
        """A drafter reads up to the last token that is right: in full layers all keys, in sliding ones those of its window."""
        size = self.pages.page_size
        places = np.arange(max(0, end - self.pages.windows["sliding_attention"] + 1), end + 1)
        read = {k: self.memory[k][t[places // size].astype(int) * size + places % size] for k, t in tables.items()}
        for kind, keys in read.items():
            assert keys[-1] == digest, f"the drafter's last key of {kind} is not that of the last token accepted"
            assert (keys == read["full_attention"]).all(), f"the drafter reads keys of {kind} that are not the request's"

    def _check_windows(self, index: int, model: dict[str, np.ndarray], tables: dict[str, np.ndarray]) -> None:
        size, kind = self.pages.page_size, "sliding_attention"
        first, end = model["starts"][index], model["starts"][index + 1]
        lowest = max(0, int(model["positions"][first]) - self.pages.windows[kind] + 1)
        places = np.arange(lowest, int(model["positions"][end - 1]) + 1)
        read = {k: self.memory[k][t[index, places // size].astype(int) * size + places % size] for k, t in tables.items()}
        assert (read[kind] == read["full_attention"]).all(), "a sliding layer reads keys that are not the request's"

    def _arrive(self, scheduled: Tokens[ScheduledChunk], tokens: list[int], accepted: list[int]) -> None:
        row = round_row = 0
        for w in scheduled:
            sequence, new = w.sequence, tokens[row : row + min(w.sampled, 1)]
            if w.samples and sequence.speculates:
                new = tokens[row : row + accepted[round_row] + 1]
                if sequence.finish_reason is None:
                    self.drafted, self.accepted = self.drafted + w.drafts, self.accepted + accepted[round_row]
                round_row += 1
            row += w.sampled
            if not w.samples or sequence.finish_reason is not None:
                continue
            stops = [i for i, token in enumerate(new, 1) if token in sequence.params.stop_token_ids]
            end = min([*stops, sequence.limit - len(sequence.output)])
            self.scheduler.arrived(sequence, new[:end], w.drafts)
            if len(sequence.output) >= sequence.limit:
                self.scheduler.finish(sequence, "length")
            elif stops:
                self.scheduler.finish(sequence, "stop")


def assert_right(sequence: Sequence) -> None:
    """Its tokens are those that the text before them asks for, as far as it came."""
    output = sequence.output
    assert output == expected(sequence.tokens[: sequence.prompt_length], len(output))
