"""New tokens from logits, for all rows of a step at once; what must be remembered of a request lies on the device.

Order, as in transformers' generate: penalties, bias, tokens that must not come yet; temperature, top-k, top-p, min-p. The host
only says what; nothing here waits for the device.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gemma4_compile.ops.sampling.logits import apply_penalties
from gemma4_compile.ops.sampling.vocabulary import Vocabulary
from gemma4_compile.packed.row_state import RowState
from gemma4_compile.packed.step_inputs import Bias, Penalties, Sampling, Shaping, StepInputs
from gemma4_compile.runtime.scheduling.sequence import ScheduledChunk

# Parameters by row of the running requests, with the dtype that the device gets.
_PARAMETERS: dict[str, Any] = {
    "temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32,
    "repetition_penalty": np.float32, "presence_penalty": np.float32, "frequency_penalty": np.float32,
}  # fmt: skip
_SHAPING = ("temperature", "top_k", "top_p", "min_p")
_EVER = 2**62  # tokens
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


class Counted(NamedTuple):
    """The tokens of a request with penalties, which has got this row: those of its prompt, and new ones."""

    row: int
    prompt: list[int]
    output: list[int]


class Sampled(NamedTuple):
    """Tokens [S]; the logits [S, shard] that they are of, with penalties and biases; and, where the step says how they
    are sampled, how many new tokens each request has before it, [S]."""

    tokens: Tensor
    logits: Tensor
    offsets: Tensor | None


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
        # [rows, shard]; made when the first request asks for penalties: 100 MB and more.
        self._counts: Tensor | None = None
        self._in_prompt: Tensor | None = None

    def begin(self, scheduled: ScheduledChunk) -> Counted | None:
        """A request has got this row. What `count` must do for it before it samples, if anything."""
        sequence, row, params = scheduled.sequence, scheduled.row, scheduled.sequence.params
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
            shape = len(self._penalizes), self.vocabulary.shard
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self._counts[row].zero_()
        self._in_prompt[row].zero_()
        prompt, output = (self.vocabulary.local_tokens(tokens) for tokens in (prompt, output))
        self._in_prompt[row, torch.tensor(prompt, dtype=torch.int64, device=self.device)] = True
        if output:
            tokens = torch.tensor(output, device=self.device)
            self._counts[row].index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))

    def sampling(self, scheduled: Sequence[ScheduledChunk], step: StepInputs[np.ndarray]) -> Sampling[np.ndarray] | None:
        """What the device must know for this step's rows, beside their state; None for a greedy step."""
        rows = step.targets

        def of(*names: str) -> Iterable[np.ndarray]:
            return (self._host[name][rows] for name in names)

        shaping = Shaping(*of(*_SHAPING, "seeds")) if self.draws(rows) else None
        penalties = Penalties(*of(*_PENALTIES)) if self._penalizes[rows].any() else None
        bias = self._bias(scheduled, step) if self._adjusts[rows].any() else None
        if shaping is penalties is bias is None:
            return None
        return Sampling(self._host["prompt_length"][rows], shaping, penalties, bias)

    def _bias(self, scheduled: Sequence[ScheduledChunk], step: StepInputs[np.ndarray]) -> Bias[np.ndarray] | None:
        """What is added to single logits: biases, and -inf for stop tokens up to so many new tokens."""
        entries: list[tuple[int, int, float, int]] = []
        # At least so many: the device knows how far draft tokens led.
        offsets = step.sampled_positions() + 1 - self._host["prompt_length"][step.targets]
        for index, params in enumerate(w.sequence.params for w in scheduled for _ in range(w.sampled)):
            entries += [(index, token, value, _EVER) for token, value in params.logit_bias.items()]
            if offsets[index] < params.min_tokens:
                banned = {*params.stop_token_ids, *(() if params.ignore_eos else self.stop_tokens)}
                entries += [(index, token, -np.inf, params.min_tokens) for token in banned]
        if not entries:
            return None
        rows, tokens, values, until = map(np.array, zip(*entries, strict=True))
        return Bias(rows, tokens, values.astype(np.float32), until)

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

    def __call__(self, logits: Tensor, step: StepInputs[Tensor], thresholds: frozenset[str]) -> Sampled:
        """A token of each row, which goes to the state.

        logits      [S, shard], the model's own
        thresholds  as of the method
        """
        targets = step.targets
        sampling = step.sampling or Sampling(targets)  # whose lengths nothing reads
        offsets = None if step.sampling is None else step.sampled_positions() + 1 - sampling.prompt_lengths
        if (penalties := sampling.penalties) is not None:
            assert self._counts is not None and self._in_prompt is not None
            logits = apply_penalties(
                logits, self._counts, self._in_prompt, targets, penalties.repetition, penalties.presence, penalties.frequency
            )
        if (bias := sampling.bias) is not None:
            assert offsets is not None
            places, own = self.vocabulary.to_shard(bias.tokens)
            values = torch.where(own & (offsets[bias.rows] < bias.until), bias.values, 0)
            logits = logits.float().index_put((bias.rows, places), values, accumulate=True)
        if (shaping := sampling.shaping) is not None:
            assert offsets is not None
            tokens = self.vocabulary.sample(
                logits, shaping.temperature, shaping.top_k, shaping.top_p, shaping.min_p, shaping.seeds, offsets, thresholds
            )
        else:
            tokens = self.vocabulary.argmax(logits)
        self.state.last[targets] = tokens
        if penalties is not None:
            places, own = self.vocabulary.to_shard(tokens)
            self._counts.index_put_((targets, places), own.to(torch.int32), accumulate=True)  # type: ignore[union-attr]
        return Sampled(tokens, logits, offsets)


def only(logits: Tensor, rows: Tensor, words: Tensor, first: int) -> Tensor:
    """Logits [S, shard] where all tokens but some are out: -inf.

    rows   [C] int64, which rows are constrained
    words  [C, vocabulary / 32, rounded up] int32: bit i of word w is set if token 32 w + i may come
    first  token of this shard
    """
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    allowed = bits.flatten(1)[:, first : first + logits.shape[1]].bool()
    return logits.index_put((rows,), logits[rows].masked_fill(~allowed, -torch.inf))


def named_logprobs(prefix: str, vocabulary: Vocabulary, logits: Tensor, tokens: Tensor, top: int) -> dict[str, Tensor]:
    """Log probabilities of these tokens and of the likeliest, by name, to be fetched together."""
    chosen, ranks, values, ids = vocabulary.logprobs(logits, tokens, top)
    return {f"{prefix}chosen": chosen, f"{prefix}ranks": ranks, f"{prefix}top": values, f"{prefix}top_ids": ids}
