"""New tokens from logits, for all rows of a step at once; what must be remembered of a request lies on the device.

Order, as in transformers' generate: penalties, bias, tokens that must not come yet; temperature, top-k, top-p, min-p. The host
only says what; nothing here waits for the device.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gemma4_compile.ops.sampling.logits import apply_penalties
from gemma4_compile.ops.sampling.vocabulary import Vocabulary
from gemma4_compile.packed.row_state import RowState
from gemma4_compile.runtime.scheduling.sequence import Work
from gemma4_compile.runtime.step.arrays import StepArrays

# Parameters by row of the running requests, with the dtype that the device gets.
_PARAMETERS: dict[str, Any] = {
    "temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32,
    "repetition_penalty": np.float32, "presence_penalty": np.float32, "frequency_penalty": np.float32,
}  # fmt: skip
Settle = Callable[[Tensor, Tensor, Tensor], Tensor]
_SHAPING = ("temperature", "top_k", "top_p", "min_p")
_EVER = 2**62  # tokens
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


class Counted(NamedTuple):
    """The tokens of a request with penalties, which has got this row: those of its prompt, and new ones."""

    row: int
    prompt: list[int]
    output: list[int]


class Sampler:
    """Parameters of the running requests, by row; tokens go to their state. Logits are those of the vocabulary's part that is
    here, and whatever several ranks sample is the same on all of them."""

    def __init__(self, rows: int, vocabulary: Vocabulary, state: RowState, stop_tokens: Iterable[int]):
        self.vocabulary, self.state, self.stop_tokens = vocabulary, state, tuple(stop_tokens)
        self.device = state.last.device
        self._host = {name: np.zeros(rows, dtype) for name, dtype in _PARAMETERS.items()}
        self._host |= {name: np.zeros(rows, np.int64) for name in ("seeds", "prompt_length")}
        self._penalizes, self._adjusts = np.zeros(rows, bool), np.zeros(rows, bool)
        self._logprobs = np.full(rows, -1)
        # [rows, tokens here]; made when the first request asks for penalties: 100 MB and more.
        self._counts: Tensor | None = None
        self._in_prompt: Tensor | None = None

    def begin(self, work: Work) -> Counted | None:
        """A request has got this row. What `count` must do for it before it samples, if anything."""
        sequence, row, params = work.sequence, work.row, work.sequence.params
        for name in _PARAMETERS:
            self._host[name][row] = getattr(params, name)
        self._host["seeds"][row], self._host["prompt_length"][row] = sequence.seed, sequence.prompt_length
        self._penalizes[row] = params.penalizes
        self._adjusts[row] = bool(params.logit_bias) or params.min_tokens > 0
        self._logprobs[row] = -1 if params.logprobs is None else params.logprobs
        if not params.penalizes:
            return None
        return Counted(row, sequence.tokens[: sequence.prompt_length], sequence.output)

    def count(self, row: int, prompt: list[int], output: list[int]) -> None:
        """Begin a row of those that penalties go by."""
        if self._counts is None or self._in_prompt is None:
            shape = len(self._penalizes), self.vocabulary.here
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self._counts[row].zero_()
        self._in_prompt[row].zero_()
        prompt, output = (self.vocabulary.own(tokens) for tokens in (prompt, output))
        self._in_prompt[row, torch.tensor(prompt, dtype=torch.int64, device=self.device)] = True
        if output:
            tokens = torch.tensor(output, device=self.device)
            self._counts[row].index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))

    def parameters(self, work: Sequence[Work], arrays: StepArrays) -> dict[str, np.ndarray]:
        """What the device must know for this step's rows, beside their state. Greedy steps need no more than the rows."""
        rows = arrays.targets
        found = {"targets": rows}
        if self._host["temperature"][rows].any():
            found |= {name: self._host[name][rows] for name in (*_SHAPING, "seeds")}
        if self._penalizes[rows].any():
            found |= {name: self._host[name][rows] for name in _PENALTIES}
        if self._adjusts[rows].any():
            found |= self._adjustments(work, arrays)
        if len(found) > 1:
            found["prompt_length"] = self._host["prompt_length"][rows]
        return found

    def _adjustments(self, work: Sequence[Work], arrays: StepArrays) -> dict[str, np.ndarray]:
        """What is added to single logits: biases, and -inf for stop tokens up to `bias_until` new tokens."""
        entries: list[tuple[int, int, float, int]] = []
        offsets = arrays.lengths - self._host["prompt_length"][arrays.targets]  # at least: the device knows how far drafts led
        for index, params in enumerate(w.sequence.params for w in work for _ in range(w.sampled)):
            entries += [(index, token, value, _EVER) for token, value in params.logit_bias.items()]
            if offsets[index] < params.min_tokens:
                banned = {*params.stop_token_ids, *(() if params.ignore_eos else self.stop_tokens)}
                entries += [(index, token, -np.inf, params.min_tokens) for token in banned]
        if not entries:
            return {}
        rows, tokens, values, until = map(np.array, zip(*entries, strict=True))
        return {"bias_rows": rows, "bias_tokens": tokens, "bias": values.astype(np.float32), "bias_until": until}

    def draws(self, rows: np.ndarray) -> bool:
        """Whether any of these rows' tokens are drawn."""
        return bool(self._host["temperature"][rows].any())

    def top(self, rows: np.ndarray) -> int:
        """How many of the likeliest tokens these rows want to be named; -1: they want no log probabilities."""
        return int(self._logprobs[rows].max(initial=-1))

    def thresholds(self, rows: np.ndarray) -> frozenset[str]:
        """Which of top_k, top_p and min_p any of these rows uses."""
        host = self._host
        used = {"top_k": host["top_k"][rows] > 0, "top_p": host["top_p"][rows] < 1, "min_p": host["min_p"][rows] > 0}
        return frozenset(name for name, found in used.items() if found.any())

    @staticmethod
    def is_greedy(parameters: dict[str, Any]) -> bool:
        """Whether the likeliest tokens are wanted, by the model's own logits."""
        return len(parameters) == 1  # targets

    def __call__(
        self, logits: Tensor, positions: Tensor, given: dict[str, Tensor], top: int, thresholds: frozenset[str],
        greedy: Tensor | None = None, settle: Settle | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Tokens [S] and, where asked for, their log probabilities.

        logits     [S, tokens here], the model's own
        positions  [S] of the tokens that they follow
        given      what `parameters` named, on the device
        top, thresholds   as of the methods
        greedy     tokens that are in the state already
        settle     has the last word: of the tokens, of logits with penalties and biases, and of how many new tokens each
                   request has
        """
        if greedy is None:
            tokens, shaped, offsets = self._sample(logits, positions, given, thresholds)
            tokens = tokens if settle is None else settle(tokens, shaped, offsets)
        else:
            tokens = greedy
        found = {"tokens": tokens}
        if top >= 0:
            found |= named_logprobs("", self.vocabulary, logits, tokens, top)
        return found

    def _sample(
        self, logits: Tensor, positions: Tensor, given: dict[str, Tensor], thresholds: frozenset[str]
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        targets = given["targets"]
        # New tokens that each request has already.
        offsets = positions + 1 - given["prompt_length"] if "prompt_length" in given else positions
        if "repetition_penalty" in given:
            assert self._counts is not None and self._in_prompt is not None
            penalties = [given[name] for name in _PENALTIES]
            logits = apply_penalties(logits, self._counts, self._in_prompt, targets, *penalties)
        if "bias" in given:
            places, own = self.vocabulary.place(given["bias_tokens"])
            bias = torch.where(own & (offsets[given["bias_rows"]] < given["bias_until"]), given["bias"], 0)
            logits = logits.float().index_put((given["bias_rows"], places), bias, accumulate=True)
        if "temperature" in given:
            temperature, top_k, top_p, min_p, seeds = (given[name] for name in (*_SHAPING, "seeds"))
            tokens = self.vocabulary.sample(logits, temperature, top_k, top_p, min_p, seeds, offsets, thresholds)
        else:
            tokens = self.vocabulary.argmax(logits)
        self.state.last[targets] = tokens
        if "repetition_penalty" in given:
            places, own = self.vocabulary.place(tokens)
            self._counts.index_put_((targets, places), own.to(torch.int32), accumulate=True)  # type: ignore[union-attr]
        return tokens, logits, offsets


def named_logprobs(prefix: str, vocabulary: Vocabulary, logits: Tensor, tokens: Tensor, top: int) -> dict[str, Tensor]:
    """Log probabilities of these tokens and of the likeliest, by name, to be fetched together."""
    chosen, ranks, values, ids = vocabulary.logprobs(logits, tokens, top)
    return {f"{prefix}chosen": chosen, f"{prefix}ranks": ranks, f"{prefix}top": values, f"{prefix}top_ids": ids}
