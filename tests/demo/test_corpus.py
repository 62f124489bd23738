"""The split of the standard library, and the prompts cut from its held-out part."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gemma4_compile.demo import HELD_OUT_MODULES, demo_checkpoint, held_out_prompts
from gemma4_compile.demo.corpus import held_out_files, is_held_out, training_files


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_checkpoint("e") / "target")


def test_every_held_out_module_is_here():
    assert [name for name, _ in held_out_files()] == list(HELD_OUT_MODULES)


@pytest.mark.parametrize(
    ("path", "held_out"),
    [
        ("textwrap.py", True),
        ("string/__init__.py", True),
        ("test/test_textwrap.py", True),
        ("test/test_string_literals.py", True),
        ("test/test_heapq/test_large.py", True),
        ("json/decoder.py", False),
        ("email/generator.py", False),
        ("asyncio/queues.py", False),
    ],
)
def test_split_is_by_name(path, held_out):
    assert is_held_out(Path(path)) is held_out


def test_training_files_hold_no_held_out_text(tmp_path):
    for name in ("queue.py", "json.py", "test/test_queue.py", "encodings/cp437.py", "test/test_json.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"name = {name!r}\n")
    assert [path for path, _ in training_files(tmp_path)] == ["json.py", "test/test_json.py"]


def test_tokenizer_round_trip(tokenizer):
    for _, text in list(held_out_files())[:6]:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id == 2
        assert tokenizer.decode(ids[1:]) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 3)
    assert len(tokenizer) == 2048


def test_prompts_repeat_and_keep_their_bounds(tokenizer):
    prompts = held_out_prompts(tokenizer, 8, 64, 200, seed=7)
    assert prompts == held_out_prompts(tokenizer, 8, 64, 200, seed=7)
    assert prompts != held_out_prompts(tokenizer, 8, 64, 200, seed=8)
    assert len(prompts) == 8 and all(64 <= len(prompt) <= 200 and prompt[0] == 2 for prompt in prompts)
    sources = [text for _, text in held_out_files()]
    assert all(any(tokenizer.decode(prompt[1:]) in text for text in sources) for prompt in prompts)


def test_one_length_is_kept_exactly(tokenizer):
    assert {len(prompt) for prompt in held_out_prompts(tokenizer, 4, 900, 900)} == {900}


def test_empty_range_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="2 <= min <= max, got 9, 4"):
        held_out_prompts(tokenizer, 1, 9, 4)


def test_library_without_sources_is_an_error(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="must hold source files"):
        held_out_prompts(tokenizer, 1, 4, 8, root=tmp_path)
