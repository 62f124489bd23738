"""Texts to tokens and tokens to texts, for HTTP. Nothing here runs on the event loop but what takes microseconds."""

import asyncio
import json
from typing import Any

from jinja2 import TemplateError
from llguidance import LLTokenizer

from .errors import ApiError
from .schema import ImagePart, Message, TextPart, Tool

_RESERVED = {"messages", "conversation", "tools", "tokenize", "return_dict", "add_generation_prompt", "continue_final_message"}


class Texts:
    """A tokenizer, as several requests use it at a time.

    tokenizer       the checkpoint's
    pieces          the same for llguidance, which knows each token's bytes
    chat_template   Jinja text; None: the tokenizer's own, if there is one
    """

    def __init__(self, tokenizer: Any, pieces: LLTokenizer, chat_template: str | None = None):
        self.tokenizer, self.pieces = tokenizer, pieces
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None)

    async def encode(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, without its chat template."""
        return await asyncio.to_thread(self._encode, prompt, add_special_tokens)

    async def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        """Raises ApiError for what is no token."""
        if wrong := [token for token in tokens if not 0 <= token < self.pieces.vocab_size]:
            raise ApiError(400, f"tokens must be 0 to {self.pieces.vocab_size - 1}, got {wrong[0]}", "tokens")
        return await asyncio.to_thread(self.tokenizer.decode, tokens, skip_special_tokens=skip_special_tokens)

    async def chat(
        self, messages: list[Message], tools: list[Tool] | None, kwargs: dict[str, Any] | None, *,
        add_generation_prompt: bool, continue_final_message: bool,
    ) -> tuple[str, list[int]]:  # fmt: skip
        """Messages through the chat template: the text and its token ids. Raises ApiError for messages that do not suit it."""
        if wrong := sorted(_RESERVED & (kwargs or {}).keys()):
            raise ApiError(
                400, f"chat_template_kwargs must not set {wrong[0]}; use the request's own fields", "chat_template_kwargs"
            )
        if not self.chat_template:
            raise ApiError(400, "this model has no chat template; use /v1/completions, or start it with --chat-template")
        if continue_final_message and add_generation_prompt:
            raise ApiError(
                400, "continue_final_message excludes add_generation_prompt; set that to false", "continue_final_message"
            )
        said = [_message(message, messages) for message in messages]
        described = [tool.model_dump(exclude_none=True) for tool in tools or []] or None
        text = await asyncio.to_thread(
            self._render, said, described, kwargs or {}, add_generation_prompt, continue_final_message
        )
        return text, await self.encode(text, add_special_tokens=False)

    def piece(self, token: int) -> bytes:
        """What a token stands for, byte by byte; special tokens by their names."""
        return bytes(self.pieces.decode_bytes([token]))

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """A batch of one: unlike `encode`, it lets other threads run meanwhile; without offsets it takes half the time."""
        return list(self.tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def _render(self, messages: Any, tools: Any, kwargs: dict[str, Any], begins: bool, continues: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=self.chat_template, tokenize=False, add_generation_prompt=begins,
                    continue_final_message=continues, **kwargs,
                )
            )  # fmt: skip
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:  # a template's own, too
            raise ApiError(
                400, f"messages must suit the chat template, got {error}; see the model's card", "messages"
            ) from error


def _message(message: Message, messages: list[Message]) -> dict[str, Any]:
    """As chat templates take it: text whole, arguments of calls as objects, results of tools with the tool's name."""
    said: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    content = message.content or ""
    if isinstance(content, list) and any(isinstance(part, ImagePart) for part in content):
        said["content"] = [
            {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text} for part in content
        ]
    elif isinstance(content, list):
        said["content"] = "".join(part.text for part in content if isinstance(part, TextPart))
    else:
        said["content"] = content
    if message.reasoning_content:
        said["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        said["tool_calls"] = [
            {"type": "function", "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)}}
            | ({"id": call.id} if call.id else {})
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        said["tool_call_id"] = message.tool_call_id
    if name := message.name or _called(message.tool_call_id, messages):
        said["name"] = name
    return said


def _arguments(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ApiError(400, "arguments of a tool call must be a JSON object; send them as they came", "messages")
    return found


def _called(call_id: str | None, messages: list[Message]) -> str | None:
    calls = (call for message in messages for call in message.tool_calls or [])
    return next((call.function.name for call in calls if call_id is not None and call.id == call_id), None)


def images_of(messages: list[Message]) -> list[dict[str, Any]]:
    """The images of messages in order, as an engine takes them. Raises ApiError for one that names a file of the server's."""
    found = []
    for message in messages:
        for part in message.content if isinstance(message.content, list) else ():
            if not isinstance(part, ImagePart):
                continue
            if not part.image_url.url.startswith(("data:", "http://", "https://")):
                raise ApiError(400, "an image must be a data URL, got another; send data:image/png;base64,...", "messages")
            found.append({"image": part.image_url.url, "max_soft_tokens": part.max_soft_tokens})
    return found
