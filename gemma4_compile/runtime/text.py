"""Prompts to token ids, and token ids to text as they come, with stop strings."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream

# A prompt: text, token ids, or messages as chat templates take them.
Prompt = str | Sequence[int] | Sequence[dict[str, Any]]


def encode(prompt: Prompt, tokenizer: Any, chat: bool) -> list[int]:
    """Token ids of a prompt. Text goes through the chat template if there is one and `chat` is set, as one user's message.

    Raises ValueError for what is none of these, text without a tokenizer, messages without a chat template or against it."""
    is_text = isinstance(prompt, str)
    if not is_text and not isinstance(prompt, Sequence):
        raise ValueError(
            f"a prompt must be text, a list of token ids or of messages, got {type(prompt).__name__}; use tolist()"
        )
    is_chat = not is_text and bool(prompt) and all(isinstance(part, dict) for part in prompt)
    if not is_text and not is_chat:
        ids = list(prompt)  # type: ignore[arg-type]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise ValueError(f"a prompt must be text, token ids or messages, got {prompt!r:.60}; tokenize it first")
        return ids  # type: ignore[return-value]
    if tokenizer is None:
        raise ValueError("text needs a tokenizer, got none with this model; pass tokenizer= to Engine, or token ids")
    template = getattr(tokenizer, "chat_template", None)
    if is_chat and not template:
        raise ValueError("messages need a chat template, got a tokenizer without one; pass text or token ids")
    if is_chat or (template and chat):
        messages = [{"role": "user", "content": prompt}] if is_text else list(prompt)
        try:
            return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
        except TemplateError as error:
            raise ValueError(f"messages must suit the chat template, got {error}; see the model's card") from error
    return list(tokenizer(prompt).input_ids)


class TextStream:
    """The text of one sample, as far as its tokens tell; cut before the first stop string. What was in it stays in it.

    text      all of it so far
    stopped   the stop string that ended it
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], skip_special_tokens: bool):
        self._tokenizer, self._stop, self._skip = tokenizer, tuple(stop), skip_special_tokens
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._tokens: list[int] = []
        self._longest = max(map(len, self._stop), default=0)
        self._given = 0
        self.text, self.stopped = "", ""

    def push(self, token: int, may_stop: bool = True) -> None:
        """One more token. A stop string counts only if this one completes it, and if it `may_stop`."""
        before = len(self.text)
        self._tokens.append(token)
        self.text += self._added_by(token)
        if may_stop:
            found = [(at, s) for s in self._stop if (at := self.text.find(s, max(0, before - len(s) + 1))) >= 0]
            if found:
                at, self.stopped = min(found)
                self.text = self.text[:at]

    def _added_by(self, token: int) -> str:
        if self._backend is not None:
            try:
                return self._stream.step(self._backend, token) or ""
            except Exception:  # of no class of its own: stray bytes make its last characters, which are out, unreadable too
                self._backend = None
        whole = self._whole()
        return "" if whole.endswith("\ufffd") else whole[len(self.text) :]  # that is a character that is not complete

    def _whole(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=self._skip)

    def close(self) -> None:
        """No more tokens: characters that were never completed become part of the text too."""
        if not self.stopped:
            self.text += self._whole()[len(self.text) :]

    def take(self, last: bool) -> str:
        """Text that was not taken yet. What may be the beginning of a stop string stays back, unless it is the last time."""
        end = len(self.text) - (0 if last else self._held_back())
        taken = self.text[self._given : end]
        self._given = max(self._given, end)
        return taken

    def _held_back(self) -> int:
        longest = min(self._longest - 1, len(self.text))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self.text[-n:]) for s in self._stop)), 0)
