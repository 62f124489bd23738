"""How one request's tokens are chosen, and when it ends."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .constraint import MakeConstraint

MAX_LOGPROBS = 100  # what a step copies to the host for each row stays small

_MOST = 1e6  # of what becomes fp32: far beyond any use, far from overflow


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request. The default is greedy.

    max_tokens            new tokens at most; None: up to the context's end
    min_tokens            no stop token is sampled, and no stop string counts, before so many new tokens
    temperature           0 is greedy
    top_k                 of the k most likely tokens; 0 for all
    top_p                 of the most likely tokens that reach this probability; after top_k
    min_p                 of tokens at least this share as likely as the likeliest
    seed                  the same tokens whatever else runs; None: a seed of the engine's
    n                     samples of one prompt, each with a seed of its own (seed, seed + 1, ...)
    stop                  strings that end the text; they are not part of it
    stop_token_ids        tokens that end it, like <eos>
    ignore_eos            go on after the model's own end tokens
    repetition_penalty    divides (or multiplies, if negative) the logits of tokens in prompt or output; 1 for none
    presence_penalty      taken from the logits of tokens in the output
    frequency_penalty     the same, for each time
    logit_bias            token -> what is added to its logit
    logprobs              log probabilities of each new token and of so many likeliest, by the model's own logits; None for none
    prompt_logprobs       the same for the prompt's tokens: all its rows are computed, prefixes are not reused
    skip_special_tokens   leave special tokens out of the text
    constraint            makes a Constraint (runtime/constraint.py) for each sample, which says at each place which tokens may
                          come; nothing is drafted then

    Raises ValueError for a value out of range, or values that contradict each other.
    """

    max_tokens: int | None = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    constraint: MakeConstraint | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, least, most in (
            ("max_tokens", 1, None), ("min_tokens", 0, None), ("top_k", 0, 2**31 - 1), ("n", 1, None),
            ("seed", 0, 2**63 - 1), ("logprobs", 0, MAX_LOGPROBS), ("prompt_logprobs", 0, MAX_LOGPROBS),
        ):  # fmt: skip
            self._check(name, int, least, most)
        for name, lower, upper in (
            ("temperature", 0.0, _MOST), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0), ("repetition_penalty", 0.0, _MOST),
            ("presence_penalty", -2.0, 2.0), ("frequency_penalty", -2.0, 2.0),
        ):  # fmt: skip
            self._check(name, (int, float), lower, upper)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be more than 0, got 0; leave it at 1 to switch it off")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens, got {self.min_tokens} and {self.max_tokens}; raise max_tokens"
            )
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise ValueError(f"stop must hold strings that are not empty, got {list(self.stop)!r}; leave it out")
        for name, tokens in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            if wrong := [token for token in tokens if isinstance(token, bool) or not isinstance(token, int)]:
                raise ValueError(f"{name} must name tokens by their ids, got {wrong[0]!r}; use the tokenizer's integers")
        if self.constraint is not None and self.min_tokens:
            raise ValueError(
                f"min_tokens and a constraint may leave no token that may come, got min_tokens={self.min_tokens}; leave it out"
            )
        for token, bias in self.logit_bias.items():
            if not isinstance(bias, (int, float)) or not (abs(bias) <= _MOST or bias == -math.inf):
                raise ValueError(
                    f"logit_bias must be -inf or within {_MOST:.0f} of 0, got {bias!r} for token {token}; use e.g. 100"
                )

    def _check(self, name: str, kinds: Any, least: float, most: float | None) -> None:
        value = getattr(self, name)
        if value is None and name in ("max_tokens", "seed", "logprobs", "prompt_logprobs"):
            return
        span = f"{least} or more" if most is None else f"{least} to {most}"
        wrong = isinstance(value, bool) or not isinstance(value, kinds)
        if wrong or not value >= least or (most is not None and value > most):  # NaN is not
            raise ValueError(f"{name} must be {span}, got {value!r}; see SamplingParams")

    @property
    def penalizes(self) -> bool:
        """Whether tokens must be counted."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def token_ids(self) -> set[int]:
        """All token ids that are named, to be checked against a vocabulary."""
        return {*self.stop_token_ids, *self.logit_bias}
