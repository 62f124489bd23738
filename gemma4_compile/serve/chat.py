"""POST /v1/chat/completions: messages are answered."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gemma4_compile.runtime.constraint import MakeConstraint
from gemma4_compile.runtime.outputs import Chunk, RequestOutput, Sample
from gemma4_compile.runtime.vision.spans import PreparedPrompt

from .answers import Answer, Delta, tool_call
from .context import Context, head, usage, usage_so_far
from .errors import ApiError
from .generation import chunks_of, outputs_of, prepared
from .http import answered
from .logprobs import chat_logprobs, prompt_logprobs
from .sampling import params_of
from .schema import ChatRequest, NamedTool, Tool, parse
from .texts import images_of


async def chat_completions(context: Context, request: Request) -> Response:
    """Raises ApiError."""
    asked = parse(ChatRequest, await context.body(request))
    context.check_model(asked.model)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs; set that to true", "top_logprobs")
    if _tools(asked) and context.template is None:
        raise ApiError(400, "this model's chat template knows no tools; leave them out, or give another template", "tools")
    run = await _Chat.of(context, asked, request.state.id)
    return await answered(request, run, asked.stream)


class _Chat:
    """One request.

    text, prompt  the prompt, through the chat template, and as an engine takes it
    """

    def __init__(
        self, context: Context, asked: ChatRequest, request_id: str, text: str, prompt: PreparedPrompt,
        constraint: MakeConstraint | None,
    ):  # fmt: skip
        self.context, self.asked, self.text, self.prompt = context, asked, text, prompt
        self.tools = _tools(asked)
        self.model = context.config.model
        self.id = f"chatcmpl-{request_id}"
        more: dict[str, Any] = {"logprobs": (asked.top_logprobs or 0) if asked.logprobs else None, "constraint": constraint}
        more["max_tokens"] = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        if context.template is not None:
            more["skip_special_tokens"] = False  # the parser goes by them
        self.params = params_of(asked, context.defaults, **more)

    @classmethod
    async def of(cls, context: Context, asked: ChatRequest, request_id: str) -> "_Chat":
        kwargs = dict(asked.chat_template_kwargs or {})
        if asked.reasoning_effort is not None:
            kwargs.setdefault("enable_thinking", asked.reasoning_effort != "none")
        images = images_of(asked.messages)
        text, tokens = await context.texts.chat(
            asked.messages, _tools(asked), kwargs, add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=asked.continue_final_message,
        )  # fmt: skip
        prompt = PreparedPrompt(tokens)
        if images:
            prompt = await prepared(context.engine, {"prompt_token_ids": tokens, "images": images})
        thinks = context.template is not None and bool(kwargs.get("enable_thinking"))
        constraint = await context.grammars.of(asked, _needed(asked), _several(asked), thinks)
        return cls(context, asked, request_id, text, prompt, constraint)

    def _answer(self) -> Answer:
        return Answer(self.context.template, self.text, self.tools, self.asked.parallel_tool_calls is not False)

    async def whole(self) -> JSONResponse:
        with self.context.gate.enter(self.params.n):
            (output,) = await outputs_of(self.context.engine, [self.prompt], self.params)
        choices = [self._choice(index, sample) for index, sample in enumerate(output.samples)]
        found = {**head("chat.completion", self.id, self.model), "choices": choices, "usage": usage([output])}
        if self.asked.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [], self.context.texts)
        if self.asked.return_token_ids:
            found["prompt_token_ids"] = output.prompt_token_ids
        return JSONResponse(found)

    def _choice(self, index: int, sample: Sample) -> dict[str, Any]:
        answer = self._answer()
        delta, last = answer.feed(sample.text), answer.close()
        content = delta.content + last.content
        calls = [tool_call(*call) for call in (*delta.tool_calls, *last.tool_calls)]
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
        if reasoning := delta.reasoning + last.reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        choice = {
            "index": index, "message": message, "logprobs": None, "stop_reason": sample.stop_reason,
            "finish_reason": _finish(sample.finish_reason, answer),
        }  # fmt: skip
        return choice | self._tokens_of(sample)

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Objects of a stream."""
        with self.context.gate.enter(self.params.n):
            async with aclosing(chunks_of(self.context.engine, [self.prompt], self.params)) as chunks:
                async for event in self._said(chunks):
                    yield event

    async def _said(self, chunks: AsyncGenerator[tuple[int, Chunk], None]) -> AsyncGenerator[dict[str, Any], None]:
        begin, options, new = head("chat.completion.chunk", self.id, self.model), self.asked.stream_options, 0
        answers: dict[int, Answer] = {}
        output: RequestOutput | None = None
        async for _, chunk in chunks:
            output = chunk.output
            new += len(chunk.token_ids)
            so_far = {"usage": usage_so_far(len(self.prompt.tokens), new)} if options.continuous_usage_stats else {}
            if chunk.index not in answers:
                answers[chunk.index] = self._answer()
                first = {"index": chunk.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield {**begin, "choices": [first | {"logprobs": None}], **so_far}
            choice = self._part(chunk, answers[chunk.index])
            if choice is not None:
                yield {**begin, "choices": [choice], **so_far}
        if options.include_usage:
            assert output is not None, "the last chunk has the output"
            yield {**begin, "choices": [], "usage": usage([output])}

    def _part(self, chunk: Chunk, answer: Answer) -> dict[str, Any] | None:
        """What a chunk adds to a choice; None for nothing."""
        calls = answer.calls
        deltas = [answer.feed(chunk.text)]
        if chunk.finish_reason is not None:
            deltas.append(answer.close())
        delta = _as_json(deltas, calls)
        if not delta and chunk.finish_reason is None and not chunk.logprobs and not self.asked.return_token_ids:
            return None
        choice: dict[str, Any] = {
            "index": chunk.index, "delta": delta, "logprobs": None,
            "finish_reason": None if chunk.finish_reason is None else _finish(chunk.finish_reason, answer),
        }  # fmt: skip
        return choice | self._tokens_of(chunk)

    def _tokens_of(self, part: Sample | Chunk) -> dict[str, Any]:
        """What a choice says of its tokens one by one, as far as it was asked for."""
        found: dict[str, Any] = {}
        if part.logprobs is not None:
            found["logprobs"] = chat_logprobs(part.logprobs, self.asked.top_logprobs or 0, self.context.texts)
        if self.asked.return_token_ids:
            found["token_ids"] = part.token_ids
        return found


def _as_json(deltas: list[Delta], calls: int) -> dict[str, Any]:
    """calls  tool calls before these"""
    found: dict[str, Any] = {}
    if content := "".join(delta.content for delta in deltas):
        found["content"] = content
    if reasoning := "".join(delta.reasoning for delta in deltas):
        found["reasoning_content"] = reasoning
    called = [call for delta in deltas for call in delta.tool_calls]
    if called:
        found["tool_calls"] = [{"index": calls + i, **tool_call(*call)} for i, call in enumerate(called)]
    return found


def _finish(reason: str, answer: Answer) -> str:
    return "tool_calls" if reason == "stop" and answer.calls else reason


def _tools(asked: ChatRequest) -> list[Tool] | None:
    """Those that the model may call."""
    return None if asked.tool_choice == "none" else asked.tools


def _several(asked: ChatRequest) -> bool:
    """Whether more than one call may be made where one must be."""
    return asked.tool_choice == "required" and asked.parallel_tool_calls is not False


def _needed(asked: ChatRequest) -> list[Tool] | None:
    """Those of which the model must call one, if it must. Raises ApiError for a choice that is none of the tools."""
    choice = asked.tool_choice
    if choice is None or choice in ("none", "auto"):
        return None
    found = [
        tool for tool in asked.tools or [] if not isinstance(choice, NamedTool) or tool.function.name == choice.function.name
    ]
    if not found:
        raise ApiError(400, "tool_choice must name one of tools; list it there", "tool_choice")
    return found
