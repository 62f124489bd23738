"""Log probabilities as OpenAI's two endpoints give them."""

from collections.abc import Iterable, Sequence
from typing import Any

from gemma4_compile.runtime.outputs import TokenLogprob

from .texts import Texts

_LEAST = -9999.0  # JSON has no infinity


def chat_logprobs(found: Sequence[TokenLogprob], top: int, texts: Texts) -> dict[str, Any]:
    """`logprobs` of a chat's choice.

    top  likeliest tokens to be named for each
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        piece = texts.piece(token)
        return {"token": piece.decode(errors="replace"), "logprob": max(logprob, _LEAST), "bytes": list(piece)}

    return {
        "content": [
            entry(one.token_id, one.logprob) | {"top_logprobs": [entry(*pair) for pair in list(one.top.items())[:top]]}
            for one in found
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """`logprobs` of a completion's choice, piece by piece: offsets go on."""

    def __init__(self, texts: Texts):
        self._texts, self._offset = texts, 0

    def __call__(self, found: Iterable[TokenLogprob | int]) -> dict[str, Any]:
        """A bare token is a prompt's first, before which nothing comes."""
        said: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for one in found:
            first = isinstance(one, int)
            token = one if isinstance(one, int) else one.token_id
            said["text_offset"].append(self._offset)
            said["tokens"].append(self._name(token))
            said["token_logprobs"].append(None if first else max(one.logprob, _LEAST))  # type: ignore[union-attr]
            said["top_logprobs"].append(None if first else self._top(one))  # type: ignore[arg-type]
            self._offset += len(self._texts.piece(token).decode(errors="replace"))
        return said

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        """The likeliest, with the token itself, as OpenAI has it."""
        named = {self._name(token): max(logprob, _LEAST) for token, logprob in one.top.items()}
        return named if one.token_id in one.top else named | {self._name(one.token_id): max(one.logprob, _LEAST)}

    def _name(self, token: int) -> str:
        """Its text, or its bytes where they are no text of their own."""
        piece = self._texts.piece(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def prompt_logprobs(found: Sequence[TokenLogprob], texts: Texts) -> list[dict[str, Any] | None]:
    """vLLM's form: for each token of a prompt those named there, by their ids; none for the first."""
    return [None, *(_by_id(one, texts) for one in found)]


def _by_id(one: TokenLogprob, texts: Texts) -> dict[str, Any]:
    named = {token: (value, rank) for rank, (token, value) in enumerate(one.top.items(), 1)}
    named[one.token_id] = one.logprob, one.rank
    return {
        str(token): {"logprob": max(value, _LEAST), "rank": rank, "decoded_token": texts.piece(token).decode(errors="replace")}
        for token, (value, rank) in named.items()
    }
