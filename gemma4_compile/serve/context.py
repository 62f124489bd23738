"""What all endpoints of a server share, and what each does first with a request."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from gemma4_compile.runtime.async_engine import AsyncEngine
from gemma4_compile.runtime.outputs import RequestOutput

from .config import ServeConfig
from .errors import ApiError
from .gate import Gate
from .grammars import Grammars
from .http import body_of
from .sampling import SamplingDefaults
from .texts import Texts


@dataclass(frozen=True)
class Context:
    """A server's parts.

    template  how answers are written, of `response_template`
    started   seconds since 1970
    """

    config: ServeConfig
    engine: AsyncEngine
    texts: Texts
    grammars: Grammars
    defaults: SamplingDefaults
    template: dict[str, Any] | None
    gate: Gate
    started: int

    async def body(self, request: Request) -> bytes:
        return await body_of(request, self.config.max_body_bytes, self.config.request_seconds)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for another model than the one that is served."""
        if name is not None and name != self.config.model:
            raise ApiError(
                404, f"model must be {self.config.model!r}, got {name!r:.100}; see /v1/models", "model", "model_not_found"
            )


def head(kind: str, request_id: str, model: str) -> dict[str, Any]:
    """What each object of a response begins with."""
    return {"id": request_id, "object": kind, "created": int(time.time()), "model": model}


def usage(outputs: Iterable[RequestOutput]) -> dict[str, Any]:
    """Tokens of all prompts and samples."""
    found = [output.metrics for output in outputs]
    counted = usage_so_far(sum(m.prompt_tokens for m in found), sum(m.output_tokens for m in found))
    return counted | {"prompt_tokens_details": {"cached_tokens": sum(m.cached_tokens for m in found)}}


def usage_so_far(prompt: int, new: int) -> dict[str, Any]:
    """Tokens of all prompts, and new ones."""
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
