"""The vision demo checkpoint: held-out pictures named right, and served as plain Hugging Face answers them."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from gemma4_compile import Engine, EngineConfig, SamplingParams, SpeculativeConfig, demo_checkpoint, optimize
from gemma4_compile.cli import main
from gemma4_compile.demo import VISION_DEMO
from gemma4_compile.demo.pictures import COLOURS, QUESTION, SHAPES, held_out_pictures, picture
from gemma4_compile.hf.assistant import load_assistant
from gemma4_compile.hf.vision import image_processor_of

FOLDER = demo_checkpoint(VISION_DEMO)
CONFIG = EngineConfig(kv_bytes=1 << 25, max_requests=16, max_batched_tokens=1024)
DTYPES = (torch.float32, torch.bfloat16)
SLOW = ((torch.float32, 3), (torch.bfloat16, 0), (torch.bfloat16, 3))


@cache
def plain(dtype: torch.dtype) -> Any:
    return AutoModelForImageTextToText.from_pretrained(FOLDER / "target", dtype=dtype).eval().requires_grad_(False)


@cache
def prompts(dtype: torch.dtype) -> list[dict[str, Any]]:
    """What generate() takes, for each held-out picture."""
    tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER / "target")
    processor = image_processor_of(FOLDER / "target")
    found = []
    for drawn in held_out_pictures():
        images = processor([drawn.image], return_tensors="pt")
        soft_tokens = int(images.pop("num_soft_tokens_per_image")[0])
        text = tokenizer.apply_chat_template(asked(drawn.image), add_generation_prompt=True, tokenize=False)
        text = text.replace("<|image|>", f"<|image>{'<|image|>' * soft_tokens}<image|>")
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        found.append({"input_ids": ids, **images})
    return found


def asked(image: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]


def generated(model: Any, dtype: torch.dtype) -> list[list[int]]:
    found = []
    with torch.no_grad():
        for given in prompts(dtype):
            out = model.generate(**given, max_new_tokens=8, do_sample=False)
            found.append(out[0, given["input_ids"].shape[1] :].tolist())
    return found


@cache
def answers(dtype: torch.dtype) -> list[list[int]]:
    """Plain Hugging Face's."""
    return generated(plain(dtype), dtype)


def test_pictures_follow_from_their_numbers() -> None:
    assert picture(3).image.tobytes() == picture(3).image.tobytes() != picture(4).image.tobytes()
    drawn = held_out_pictures()
    assert len(drawn) == 30 and len({p.name for p in drawn}) > 15
    assert {p.colour for p in drawn} == set(COLOURS) and {p.shape for p in drawn} == set(SHAPES)


def test_the_checkpoint_is_small_and_says_how_it_was_made() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 8 << 20
    record = json.loads((FOLDER / "metrics.json").read_text())
    assert record["measured"]["held_out_right"] >= 28


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_held_out_pictures_are_named_right(dtype: torch.dtype) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER / "target")
    said = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers(dtype)]
    right = sum(text == drawn.name for text, drawn in zip(said, held_out_pictures(), strict=True))
    assert right >= 28, said


@pytest.mark.parametrize(
    ("dtype", "drafts"),
    [(torch.float32, 0), *(pytest.param(*which, marks=pytest.mark.slow) for which in SLOW)],
    ids=lambda value: str(value),
)
def test_an_engine_answers_all_30_as_hugging_face_does(dtype: torch.dtype, drafts: int) -> None:
    """All pictures at once."""
    speculative = None
    if drafts:
        assistant = load_assistant(FOLDER / "assistant", dtype=dtype).eval().requires_grad_(False)
        speculative = SpeculativeConfig(assistant, drafts)
    engine = Engine(FOLDER / "target", replace(CONFIG, dtype=dtype), speculative=speculative)
    outputs = engine.generate([asked(drawn.image) for drawn in held_out_pictures()], SamplingParams(max_tokens=8))
    for output, wanted, given in zip(outputs, answers(dtype), prompts(dtype), strict=True):
        assert output.prompt_token_ids == given["input_ids"][0].tolist()
        assert output.token_ids == wanted
    if drafts:
        assert sum(output.metrics.accepted_draft_tokens for output in outputs) > len(outputs)
    assert engine.runner.images is not None and engine.runner.images.encoder.encoded == len(outputs)
    assert engine.runner.images.encoder.chunks < len(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:gemma4_compile runs this call as one graph")
def test_optimize_answers_all_30_as_hugging_face_does(dtype: torch.dtype) -> None:
    model = AutoModelForImageTextToText.from_pretrained(FOLDER / "target", dtype=dtype).eval().requires_grad_(False)
    assert generated(optimize(model), dtype) == answers(dtype)


def test_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["demo", "--image", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == picture(3).name and Path(found["image"]).is_file()
    drawn = tmp_path / "drawn.png"
    picture(5).image.save(drawn)
    assert main(["demo", "--image", str(drawn), "--device", "cpu", "--prompt", "Which colour is it?"]) == 0
    path, question, answer, *_ = capsys.readouterr().out.splitlines()
    assert (path, question, answer) == (str(drawn), "Which colour is it?", picture(5).colour)
    assert main(["demo", "--image", str(tmp_path / "none.png"), "--device", "cpu"]) == 1
    assert "an image must be readable" in capsys.readouterr().err
