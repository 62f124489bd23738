"""A request's sampling fields as SamplingParams, with the checkpoint's own defaults for what it leaves out."""

from dataclasses import dataclass, fields
from typing import Any

from gemma4_compile.runtime.sampling_params import SamplingParams

from .errors import ApiError
from .schema import ChatRequest, CompletionRequest

_SHARED = ("n", "seed", "min_tokens", "ignore_eos", "skip_special_tokens", "prompt_logprobs")


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request gets that does not say: of the checkpoint's generation config, as transformers' generate takes it."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, generation: Any) -> "SamplingDefaults":
        """generation  GenerationConfig or None"""
        given = {name.name: getattr(generation, name.name, None) for name in fields(cls)}
        found = {name: value for name, value in given.items() if value is not None}
        if not getattr(generation, "do_sample", False):
            return cls(repetition_penalty=found.get("repetition_penalty", 1.0))
        return cls(**{"temperature": 1.0, **found})


def params_of(request: ChatRequest | CompletionRequest, defaults: SamplingDefaults, **more: Any) -> SamplingParams:
    """Raises ApiError for values out of range. `more` are fields of SamplingParams that the endpoints name differently."""
    sampled = {name.name: getattr(request, name.name) for name in fields(defaults)}
    chosen = {name: getattr(defaults, name) if value is None else value for name, value in sampled.items()}
    given = {name: getattr(request, name) for name in _SHARED} | chosen | more
    try:
        return SamplingParams(
            **given, stop=request.stop or (), stop_token_ids=request.stop_token_ids or (),
            logit_bias=_bias(request.logit_bias or {}), presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
        )  # fmt: skip
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_value") from None


def _bias(given: dict[str, float]) -> dict[int, float]:
    if wrong := next((name for name in given if not name.isdecimal()), ""):
        raise ApiError(400, f"logit_bias must name tokens by their ids, got {wrong!r}; use /tokenize", "logit_bias")
    return {int(name): value for name, value in given.items()}
