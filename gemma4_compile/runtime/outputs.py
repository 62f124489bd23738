"""What an engine gives back: chunks while a request runs, its output when it has ended."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .metrics import RequestMetrics


@dataclass(frozen=True)
class TokenLogprob:
    """Log probabilities (natural logarithm) at one position, by the model's own logits.

    token_id   the token that stands there
    rank       its place among all tokens, 1 for the likeliest
    top        the likeliest tokens, best first
    """

    token_id: int
    logprob: float
    rank: int
    top: Mapping[int, float]


@dataclass(frozen=True)
class Sample:
    """One of the n samples of a prompt.

    finish_reason  "stop" (a stop token or string), "length", "abort" or "error"
    stop_reason    the token id or the string that ended it
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A request that has ended. token_ids, text, finish_reason and logprobs are those of the first sample.

    prompt_logprobs  one less than prompt tokens: nothing comes before the first
    error            why finish_reason is "error"; empty otherwise
    """

    request_id: str
    prompt_token_ids: list[int]
    samples: list[Sample]
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprob] | None = None
    error: str = ""

    @property
    def token_ids(self) -> list[int]:
        return self.samples[0].token_ids

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def finish_reason(self) -> str:
        return self.samples[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.samples[0].logprobs


@dataclass(frozen=True)
class Chunk:
    """What a step adds to a sample. Texts of a sample's chunks join to its text; one may be empty, where a character or a stop
    string is not complete yet.

    index    of the sample
    output   the whole, with the last chunk of the request; None before
    """

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None
    output: RequestOutput | None = None

    def joined(self, later: "Chunk") -> "Chunk":
        """This and the next of its sample as one."""
        logprobs = None if self.logprobs is None else self.logprobs + (later.logprobs or [])
        return replace(later, token_ids=self.token_ids + later.token_ids, text=self.text + later.text, logprobs=logprobs)
