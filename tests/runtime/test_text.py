"""Text as it comes: chunks that join to the whole, characters never in halves, stop strings never in sight."""

import copy
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from gemma4_compile import demo_checkpoint
from gemma4_compile.hf.loading import tokenizer_of
from gemma4_compile.runtime.text import TextStream, encode, prompts_of

WORDS = ["é", "你", "😀", "naïve ", "<pad>", "def f(x):\n", "    ", " ", "a", "ab", "END", "\n\n", "ß\u200d👩\u200d🔬"]


@cache
def byte_level() -> Any:
    """As the demo checkpoints have it: each token is a string of bytes."""
    return tokenizer_of(demo_checkpoint("e") / "target")


@cache
def byte_fallback() -> Any:
    """As Gemma has it: pieces of text, and single bytes for characters that have no piece."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁a", *sorted({c for word in WORDS for c in word if c not in "é你😀▁"})]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")


class Slow:
    """A tokenizer without a backend that decodes step by step."""

    chat_template = None

    def __init__(self) -> None:
        self.decode, self._call = byte_level().decode, byte_level()

    def __call__(self, text: str) -> Any:
        return self._call(text)


TOKENIZERS: dict[str, Any] = {"byte level": byte_level, "byte fallback": byte_fallback, "slow": Slow}
each = pytest.mark.parametrize("name", TOKENIZERS)


def ids_of(text: str, tokenizer: Any = None) -> list[int]:
    return (tokenizer or byte_level())(text, add_special_tokens=False).input_ids


def run(
    tokens: list[int], tokenizer: Any = None, stop: tuple[str, ...] = (), skip: bool = True, min_tokens: int = 0
) -> tuple[list[str], TextStream]:
    """Chunks of tokens that come one by one, as an engine does it."""
    stream, chunks = TextStream(tokenizer or byte_level(), stop, skip), []
    for count, token in enumerate(tokens, start=1):
        stream.push(token, may_stop=count > min_tokens)
        last = bool(stream.stopped) or count == len(tokens)
        if last:
            stream.close()
        chunks.append(stream.take(last))
        if last:
            break
    return chunks, stream


@each
@pytest.mark.parametrize("skip", [True, False])
def test_chunks_join_to_the_decoded_text(name: str, skip: bool) -> None:
    tokenizer, chooser = TOKENIZERS[name](), random.Random(0)
    source = byte_level() if name == "slow" else tokenizer
    for _ in range(40):
        before, behind = ("".join(chooser.choices(WORDS, k=chooser.randint(1, 6))) for _ in range(2))
        tokens = [*ids_of(before, source), source.eos_token_id, *ids_of(behind, source)]
        chunks, stream = run(tokens, tokenizer, skip=skip)
        assert "".join(chunks) == stream.text == tokenizer.decode(tokens, skip_special_tokens=skip)


@each
@pytest.mark.parametrize("character", ["é", "你", "😀"])
def test_characters_come_whole(name: str, character: str) -> None:
    tokenizer = TOKENIZERS[name]()
    tokens = ids_of(f"a{character}a{character}", byte_level() if name == "slow" else tokenizer)
    chunks, _ = run(tokens, tokenizer)
    size = (len(tokens) - 2) // 2
    assert size > 1
    if name == "byte fallback":  # with what ends the run of bytes
        assert chunks == ["a", *[""] * size, f"{character}a", *[""] * (size - 1), character]
    else:
        assert chunks == ["a", *[""] * (size - 1), character] * 2


@each
def test_whatever_tokens_come(name: str) -> None:
    """Random ones, bytes that are no character too. What was given is never taken back."""
    tokenizer, chooser = TOKENIZERS[name](), random.Random(1)
    for _ in range(300):
        tokens = [chooser.randrange(3, 262) for _ in range(chooser.randint(1, 12))]
        chunks, stream = run(tokens, tokenizer)
        assert "".join(chunks) == stream.text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_stray_bytes_behind_a_character() -> None:
    """The decoder of tokenizers raises here: "Invalid prefix encountered"."""
    tokens = [4 + byte for byte in "你".encode() + b"\xe4"] + ids_of("ab", byte_fallback())
    chunks, stream = run(tokens, byte_fallback())
    assert stream.text == "".join(chunks) == byte_fallback().decode(tokens) == 4 * "\ufffd" + "ab"
    assert chunks[:4] == [""] * 4


def test_a_character_that_is_never_complete_comes_last() -> None:
    tokens = ids_of("a😀")
    for name in ("byte level", "slow"):
        chunks, stream = run(tokens[:-1], TOKENIZERS[name]())
        assert chunks[-2:] == ["", "\ufffd"] and stream.text == "a\ufffd"


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_bytes_that_are_cut_off(cut: int) -> None:
    """None of a run of bytes is given before it is known what all of them are."""
    tokens = [261, *(4 + byte for byte in "𓀀𓀁𓀂".encode())]
    tokens = tokens[: len(tokens) - cut]
    chunks, stream = run(tokens, byte_fallback())
    assert "".join(chunks) == stream.text == byte_fallback().decode(tokens)
    assert not any(chunks[1:-1])


@pytest.mark.parametrize("stop", ["<eos>", "b<eos>", "a<eos>a"])
def test_special_tokens_stop(stop: str) -> None:
    """Though text leaves them out; as with Hugging Face's stop_strings, in front of what stops."""
    tokenizer = byte_level()
    end = tokenizer.convert_tokens_to_ids("<eos>")
    tokens = [*ids_of("x b"), end, *ids_of("b a"), end, *ids_of("ab")]
    chunks, stream = run(tokens, tokenizer, (stop,))
    whole = tokenizer.decode(tokens, skip_special_tokens=False)
    assert "".join(chunks) == stream.text and stream.stopped == stop
    assert stream.text == whole[: whole.find(stop)].replace("<eos>", "")
    assert not run(tokens, tokenizer, (stop,), min_tokens=len(tokens))[1].stopped


@pytest.mark.parametrize(
    ("text", "stop", "left", "why"),
    [
        ("def add(a, b):\n    return a", ("    return",), "def add(a, b):\n", "    return"),  # spans tokens
        ("one END two", ("END", "END two"), "one ", "END"),  # the longer one can never be reached
        ("one END two", ("END two", "ND"), "one E", "ND"),  # what is complete first
        ("xaab", ("aab", "ab"), "x", "aab"),  # both with one token: the leftmost
        ("END", ("END",), "", "END"),
        ("x你y", ("你",), "x", "你"),  # of several tokens
        ("one EN two", ("END",), "one EN two", ""),
        ("aaab", ("aab",), "a", "aab"),  # overlaps itself
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], left: str, why: str) -> None:
    for pieces in (ids_of(text), [token for c in text for token in ids_of(c)]):
        chunks, stream = run(pieces, stop=stop)
        assert ("".join(chunks), stream.text, stream.stopped) == (left, left, why)


def test_what_may_be_a_stop_string_is_held_back() -> None:
    """Never shown and taken back, and shown as soon as it cannot be one any more."""
    chunks, _ = run([token for c in "x EN EN.END" for token in ids_of(c)], stop=("END",))
    assert chunks == ["x", " ", "", "", "EN ", "", "", "EN.", "", "", ""]


def test_held_back_text_comes_at_the_end() -> None:
    chunks, stream = run([token for c in "xEN" for token in ids_of(c)], stop=("END",))
    assert chunks == ["x", "", "EN"] and stream.text == "xEN"


@pytest.mark.parametrize("stop", [("ab",), ("ab", "a long one")])
def test_a_stop_string_before_min_tokens_never_counts(stop: tuple[str, ...]) -> None:
    tokens = [token for c in "xabyzab!" for token in ids_of(c)]
    chunks, stream = run(tokens, stop=stop, min_tokens=4)
    assert "".join(chunks) == stream.text == "xabyz" and stream.stopped == "ab"


# Prompts

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
    "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
)


def with_template() -> Any:
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_text_and_token_ids() -> None:
    assert encode("def f", byte_level(), chat=True) == byte_level()("def f").input_ids
    assert encode((5, 6), None, chat=True) == encode([5, 6], byte_level(), chat=False) == [5, 6]
    assert encode("def f", Slow(), chat=True) == byte_level()("def f").input_ids
    assert encode([], None, chat=True) == []  # an engine says that there must be one


def test_the_chat_template() -> None:
    tokenizer = with_template()
    said = [{"role": "user", "content": "hi"}, {"role": "model", "content": "yes?"}, {"role": "user", "content": "go"}]
    assert tokenizer.decode(encode(said, tokenizer, chat=False)) == "<user>hi\n<model>yes?\n<user>go\n<model>"
    assert tokenizer.decode(encode("hi", tokenizer, chat=True)) == "<user>hi\n<model>"
    assert encode("hi", tokenizer, chat=False) == byte_level()("hi").input_ids


@pytest.mark.parametrize(
    ("prompt", "tokenizer", "message"),
    [
        ("hi", None, "text needs a tokenizer"),
        ([{"role": "user", "content": "hi"}], None, "text needs a tokenizer"),
        ([{"role": "user", "content": "hi"}], byte_level, "messages need a chat template"),
        ([{"role": "model", "content": "hi"}], with_template, "must suit the chat template, got begin with the user"),
        ([1, "2"], None, "a prompt must be text, token ids or messages"),
        ([True], None, "a prompt must be text, token ids or messages"),
        ([1.5], None, "a prompt must be text, token ids or messages"),
        (5, None, "got int; use tolist()"),
        (None, byte_level, "got NoneType"),
    ],
)
def test_prompts_that_are_none(prompt: Any, tokenizer: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        encode(prompt, tokenizer and tokenizer(), chat=True)
    assert message in str(caught.value) and "; " in str(caught.value)


@pytest.mark.parametrize("given", [
    "def f(x):", {"prompt": "def f(x):"}, byte_level()("def f(x):"), byte_level()(["def f(x):"]),
    byte_level()("def f(x):", return_tensors="pt"), {"prompt_token_ids": byte_level()("def f(x):").input_ids},
    np.array(byte_level()("def f(x):").input_ids), torch.tensor([byte_level()("def f(x):").input_ids]),
    [np.int64(i) for i in byte_level()("def f(x):").input_ids], [{"prompt": "def f(x):"}],
], ids=lambda given: type(given).__name__)  # fmt: skip
def test_one_prompt_in_many_forms(given: Any) -> None:
    (prompt,) = prompts_of(given)
    ids = encode(prompt, byte_level(), False)
    assert ids == byte_level()("def f(x):").input_ids and all(type(i) is int for i in ids)


def test_several_prompts_of_a_tokenizer() -> None:
    """Without what its attention mask hides."""
    texts = ["def f(x):", "if x"]
    expected = [byte_level()(text).input_ids for text in texts]
    padding = byte_level()
    for given in (
        padding(texts),
        padding(texts, padding=True),
        padding(texts, padding=True, return_tensors="pt"),
        texts,
        expected,
    ):
        assert [encode(prompt, byte_level(), False) for prompt in prompts_of(given)] == expected
    with pytest.raises(ValueError, match="got 2 in a mapping"):
        encode(padding(texts), byte_level(), False)


def test_a_mapping_that_is_no_prompt() -> None:
    with pytest.raises(TypeError, match="must have input_ids, prompt_token_ids or prompt, got 'role', 'content'"):
        prompts_of({"role": "user", "content": "hello"})
    with pytest.raises(ValueError, match="must be \\[tokens\\] or"):
        prompts_of(torch.zeros(1, 2, 3))
    assert prompts_of([{"role": "user", "content": "hello"}]) == [[{"role": "user", "content": "hello"}]]
