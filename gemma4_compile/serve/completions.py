"""POST /v1/completions: texts or token ids are continued."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gemma4_compile.runtime.constraint import MakeConstraint
from gemma4_compile.runtime.outputs import Chunk, RequestOutput, Sample, TokenLogprob

from .context import Context, head, usage, usage_so_far
from .errors import ApiError
from .generation import chunks_of, outputs_of
from .http import answered
from .logprobs import CompletionLogprobs, prompt_logprobs
from .sampling import params_of
from .schema import CompletionRequest, parse


async def completions(context: Context, request: Request) -> Response:
    """Raises ApiError."""
    asked = parse(CompletionRequest, await context.body(request))
    context.check_model(asked.model)
    if asked.stream and asked.echo and (asked.logprobs is not None or asked.max_tokens == 0):
        raise ApiError(400, "an echo with logprobs, or alone, comes whole; set stream to false", "stream")
    if asked.best_of is not None and asked.best_of != asked.n:
        raise ApiError(400, f"best_of must be n={asked.n}, got {asked.best_of}; leave it out", "best_of")
    run = await _Completion.of(context, asked, request.state.id)
    return await answered(request, run, asked.stream)


class _Completion:
    """One request. Choices are numbered through prompts and their samples."""

    def __init__(
        self, context: Context, asked: CompletionRequest, request_id: str, prompts: list[list[int]], echoes: list[str],
        constraint: MakeConstraint | None,
    ):  # fmt: skip
        self.context, self.asked, self.prompts, self.echoes = context, asked, prompts, echoes
        self._head = head("text_completion", f"cmpl-{request_id}", context.config.model)
        # A prompt's log probabilities alone need no new token; the engine computes one.
        self._silent = asked.echo and asked.max_tokens == 0
        more: dict[str, Any] = {"max_tokens": 1 if self._silent else asked.max_tokens, "logprobs": asked.logprobs}
        more["constraint"] = constraint
        if asked.echo and asked.logprobs is not None:
            more["prompt_logprobs"] = asked.logprobs
        self.params = params_of(asked, context.defaults, **more)

    @classmethod
    async def of(cls, context: Context, asked: CompletionRequest, request_id: str) -> "_Completion":
        given: Any = asked.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given:
            raise ApiError(400, "prompt must not be empty; give a text or token ids", "prompt")
        special, texts = asked.add_special_tokens, context.texts
        prompts = [await texts.encode(one, special) if isinstance(one, str) else one for one in given]
        echoes = [""] * len(prompts)
        if asked.echo:
            echoes = [one if isinstance(one, str) else await texts.decode(one, True) for one in given]
        constraint = await context.grammars.of(asked)
        return cls(context, asked, request_id, prompts, echoes, constraint)

    async def whole(self) -> JSONResponse:
        with self.context.gate.enter(len(self.prompts) * self.params.n):
            outputs = await outputs_of(self.context.engine, self.prompts, self.params)
        choices = [
            self._choice(place, index, sample, output)
            for place, output in enumerate(outputs)
            for index, sample in enumerate(output.samples)
        ]
        return JSONResponse({**self._head, "choices": choices, "usage": usage(outputs)})

    def _choice(self, place: int, index: int, sample: Sample, output: RequestOutput) -> dict[str, Any]:
        text, tokens, logprobs = sample.text, sample.token_ids, sample.logprobs
        if self._silent:
            text, tokens, logprobs = "", [], [] if logprobs is not None else None
        choice = {
            "index": place * self.params.n + index, "text": self.echoes[place] + text, "logprobs": None,
            "finish_reason": sample.finish_reason, "stop_reason": sample.stop_reason,
        }  # fmt: skip
        if logprobs is not None:
            named: list[TokenLogprob | int] = [*logprobs]
            if self.asked.echo:
                named[:0] = [output.prompt_token_ids[0], *(output.prompt_logprobs or [])]
            choice["logprobs"] = CompletionLogprobs(self.context.texts)(named)
        if self.asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [], self.context.texts)
        if self.asked.return_token_ids:
            choice |= {"token_ids": tokens, "prompt_token_ids": output.prompt_token_ids}
        return choice

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Objects of a stream."""
        with self.context.gate.enter(len(self.prompts) * self.params.n):
            async with aclosing(chunks_of(self.context.engine, self.prompts, self.params)) as chunks:
                async for event in self._said(chunks):
                    yield event

    async def _said(self, chunks: AsyncGenerator[tuple[int, Chunk], None]) -> AsyncGenerator[dict[str, Any], None]:
        options = self.asked.stream_options
        prompt, new = sum(map(len, self.prompts)), 0
        outputs: list[RequestOutput] = []
        names: dict[int, CompletionLogprobs] = {}
        async for place, chunk in chunks:
            number = place * self.params.n + chunk.index
            text = chunk.text
            if number not in names:
                names[number], text = CompletionLogprobs(self.context.texts), self.echoes[place] + text
            if chunk.output is not None:
                outputs.append(chunk.output)
            choice: dict[str, Any] = {
                "index": number, "text": text, "finish_reason": chunk.finish_reason,
                "logprobs": None if chunk.logprobs is None else names[number](chunk.logprobs),
            }  # fmt: skip
            if self.asked.return_token_ids:
                choice["token_ids"] = chunk.token_ids
            new += len(chunk.token_ids)
            so_far = {"usage": usage_so_far(prompt, new)} if options.continuous_usage_stats else {}
            yield {**self._head, "choices": [choice], **so_far}
        if options.include_usage:
            yield {**self._head, "choices": [], "usage": usage(outputs)}
