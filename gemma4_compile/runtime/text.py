"""Prompts to token ids, and token ids to text as they come, with stop strings."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream
from torch import Tensor

from .vision.spans import PreparedPrompt

# A prompt: text, token ids, or messages as chat templates take them. Arrays and tensors of ids will do, and what a tokenizer
# gives; {"prompt": text} and {"prompt_token_ids": ids} are what they say, with "images" and "videos" beside. Engine.prepare
# gives the last.
Prompt = str | Sequence[int] | Sequence[dict[str, Any]] | Mapping[str, Any] | np.ndarray | Tensor | PreparedPrompt

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_TEXT, _IDS = ("prompt",), ("input_ids", "prompt_token_ids")


def prompts_of(given: Any) -> list[Any]:
    """One prompt or several, as several. Token ids and messages are lists too; what a tokenizer gives may hold one or several.

    Raises TypeError for a mapping that is no prompt, ValueError for arrays of more than two dimensions."""
    if isinstance(given, PreparedPrompt):
        return [given]
    if isinstance(given, Mapping):
        return [given] if "images" in given or "videos" in given else _of_mapping(given)
    if isinstance(given, (np.ndarray, Tensor)):
        if given.ndim > 2:
            raise ValueError(f"token ids must be [tokens] or [prompts, tokens], got {list(given.shape)}; flatten them")
        return [given] if given.ndim < 2 else [*given]
    if isinstance(given, str):
        return [given]
    given = list(given)
    return [given] if given and isinstance(given[0], (int, np.integer, Mapping)) and not _is_prompt(given[0]) else given


def _is_prompt(value: Any) -> bool:
    return isinstance(value, Mapping) and any(name in value for name in _TEXT + _IDS)


def _of_mapping(given: Mapping[str, Any]) -> list[Any]:
    for name in _IDS:
        if name in given:
            ids, mask = prompts_of(given[name]), given.get("attention_mask")
            if mask is None:
                return ids
            masks = prompts_of(mask)
            kept = zip(ids, masks, strict=True)
            return [[i for i, m in zip(_listed(row), _listed(shown), strict=True) if m] for row, shown in kept]
    if "prompt" in given:
        return [given["prompt"]]
    raise TypeError(
        f"a mapping must have input_ids, prompt_token_ids or prompt, got {', '.join(map(repr, given)) or 'none'}; "
        "pass messages as a list"
    )


def _listed(ids: Any) -> list[Any]:
    return ids.tolist() if isinstance(ids, (np.ndarray, Tensor)) else list(ids)


def encode(prompt: Prompt, tokenizer: Any, chat: bool, expand: Callable[[str], str] = str) -> list[int]:
    """Token ids of a prompt. Text goes through the chat template if there is one and `chat` is set, as one user's message.

    expand   makes what becomes tokens of the text that a template gives

    Raises ValueError for what is none of these, text without a tokenizer, messages without a chat template or against it;
    TypeError for a mapping that is no prompt."""
    if isinstance(prompt, Mapping):
        prompts = _of_mapping(prompt)
        if len(prompts) != 1:
            raise ValueError(f"one prompt must be given here, got {len(prompts)} in a mapping; pass them to generate()")
        return encode(prompts[0], tokenizer, chat, expand)
    if isinstance(prompt, (np.ndarray, Tensor)):
        if prompt.ndim == 2 and prompt.shape[0] == 1:
            prompt = prompt[0]
        if prompt.ndim != 1:
            raise ValueError(f"token ids must be [tokens], got {list(prompt.shape)}; pass several prompts to generate()")
        prompt = prompt.tolist()
    is_text = isinstance(prompt, str)
    if not is_text and not isinstance(prompt, Sequence):
        raise ValueError(
            f"a prompt must be text, a list of token ids or of messages, got {type(prompt).__name__}; use tolist()"
        )
    is_chat = not is_text and bool(prompt) and all(isinstance(part, Mapping) for part in prompt)
    if not is_text and not is_chat:
        ids = list(prompt)
        if any(isinstance(i, (bool, np.bool_)) or not isinstance(i, (int, np.integer)) for i in ids):
            raise ValueError(f"a prompt must be text, token ids or messages, got {prompt!r:.60}; tokenize it first")
        return [int(i) for i in ids]  # type: ignore[arg-type]
    if tokenizer is None:
        raise ValueError("text needs a tokenizer, got none with this model; pass tokenizer= to Engine, or token ids")
    template = getattr(tokenizer, "chat_template", None)
    if is_chat and not template:
        raise ValueError("messages need a chat template, got a tokenizer without one; pass text or token ids")
    if is_chat or (template and chat):
        messages = [{"role": "user", "content": prompt}] if is_text else list(prompt)
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise ValueError(f"messages must suit the chat template, got {error}; see the model's card") from error
        return list(tokenizer(expand(text), add_special_tokens=False).input_ids)
    return list(tokenizer(expand(str(prompt))).input_ids)


class TextStream:
    """The text of one sample, as far as its tokens tell; cut before the first stop string. What was in it stays in it.

    A run of tokens that stand for a byte each is given once it is whole: if its bytes are no text, none of them is, and
    tokenizers write another character for each. Special tokens are found by stop strings that name them also where text leaves
    them out.

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
        self._run: int | None = None  # where the text of a run of bytes begins that goes on
        self.text, self.stopped = "", ""
        special = getattr(tokenizer, "all_special_tokens", ()) if skip_special_tokens else ()
        named = [s for s in self._stop if any(token in s for token in special)]
        self._whole_text = TextStream(tokenizer, named, False) if named else None

    def push(self, token: int, may_stop: bool = True) -> None:
        """One more token. A stop string counts only if this one completes it, and if it `may_stop`."""
        before = len(self.text)
        self._tokens.append(token)
        self.text += self._added_by(token)
        if self._is_byte(token):
            self._run = before if self._run is None else self._run
        elif self._run is not None:
            self._run = None
            if "\ufffd" in (whole := self._whole()):  # perhaps of the run's bytes
                self.text = whole.removesuffix("\ufffd")
        if may_stop:
            found = [(at, s) for s in self._stop if (at := self.text.find(s, max(0, before - len(s) + 1))) >= 0]
            if found:
                at, self.stopped = min(found)
                self.text = self.text[:at]
        if self._whole_text is not None:
            self._find_specials(token, before, may_stop)

    def _find_specials(self, token: int, before: int, may_stop: bool) -> None:
        """A stop string that names a special token: what of the text was in front of it, or of its ordinary part, stays."""
        assert self._whole_text is not None
        begun = len(self._whole_text.text)
        self._whole_text.push(token, may_stop)
        if self._whole_text.stopped and not self.stopped:
            self.stopped = self._whole_text.stopped
            cut = max(0, begun - len(self._whole_text.text))  # characters of earlier tokens that belong to it
            self.text = self.text[: max(self._given, before - cut)]

    def _is_byte(self, token: int) -> bool:
        name = getattr(self._tokenizer, "convert_ids_to_tokens", lambda _: None)(token)
        return isinstance(name, str) and _BYTE.fullmatch(name) is not None

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
            self.text = self.text[: self._run] + self._whole()[len(self.text[: self._run]) :]
        self._run = None

    def take(self, last: bool) -> str:
        """Text that was not taken yet. What may be the beginning of a stop string stays back, unless it is the last time."""
        end = len(self.text) - (0 if last else self._held_back())
        if not last and self._run is not None:
            end = min(end, self._run)
        taken = self.text[self._given : end]
        self._given = max(self._given, end)
        return taken

    def _held_back(self) -> int:
        longest = min(self._longest - 1, len(self.text))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self.text[-n:]) for s in self._stop)), 0)
