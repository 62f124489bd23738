"""Checkpoints that are missing or broken: one line each."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma4ForCausalLM

from gemma4_compile import demo_checkpoint
from gemma4_compile.hf.loading import load, random_model


def test_loads_a_demo_checkpoint() -> None:
    model, tokenizer = load(demo_checkpoint("e") / "target")
    assert not model.training and tokenizer.decode(tokenizer("def f():").input_ids, skip_special_tokens=True) == "def f():"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "no such folder"),
        ("empty", "a folder without config.json"),
        ("config", "config.json must be a JSON object"),
        ("type", "must have model_type gemma4, gemma4_unified or one of their text parts, got 'llama'"),
        ("weights", "the weights must be readable"),
        ("no weights", "the weights must be readable"),
    ],
)
def test_broken_folders(tmp_path: Path, damage: str, message: str) -> None:
    folder = tmp_path / "checkpoint"
    if damage == "empty":
        folder.mkdir()
    elif damage != "missing":
        shutil.copytree(demo_checkpoint("e") / "target", folder)
    if damage == "config":
        (folder / "config.json").write_text("{")
    elif damage == "type":
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    elif damage == "weights":
        (folder / "model.safetensors").write_bytes(b"no safetensors")
    elif damage == "no weights":
        (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody should download weights again because they are larger than the GPU."""

    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    for model, name in ((AutoModelForCausalLM, "from_pretrained"), (Gemma4ForCausalLM, "to")):
        with monkeypatch.context() as patch:
            patch.setattr(model, name, full)
            with pytest.raises(ValueError, match="must fit into the GPU's memory, got 'CUDA out of memory.* 2 GiB'; free"):
                load(demo_checkpoint("e") / "target")


def test_broken_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(ValueError, match="a config must be a JSON object"):
        random_model(tmp_path / "config.json")
