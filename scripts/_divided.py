"""Models of real size with random weights, divided between the ranks of a torchrun: there is no checkpoint to load them from.

transformers divides what it loads. So it loads a checkpoint whose weights are a hole in a file, which takes neither disk nor
time, and each rank draws its own part afterwards. What every rank has whole is drawn alike on all of them."""

import json
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from gemma4_compile.hf import parallel
from gemma4_compile.hf.assistant import assistant_class
from gemma4_compile.hf.checkpoints import TEXT_CONFIGS
from gemma4_compile.hf.loading import assistant_config, cut, shuffle_embeddings

_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}


def divided_model(name: str, layers: int | None = None, **overrides: Any) -> Any:
    """As loading.random_model, bf16, divided between all ranks."""
    config = Gemma4TextConfig(**cut(TEXT_CONFIGS[name], layers) | overrides)
    with _hollow(Gemma4ForCausalLM, config) as folder:
        return _drawn(parallel.load(folder, dtype=torch.bfloat16))


def divided_assistant(name: str, target: Any, vocab_size: int | None = None) -> Any:
    """As loading.random_assistant, bf16, divided as its target."""
    with _hollow(assistant_class(), assistant_config(name, vocab_size)) as folder:
        assistant = _drawn(parallel.load_assistant(folder, parallel.division_of(target), torch.bfloat16))
    shuffle_embeddings(assistant, 0)
    return assistant


@contextmanager
def _hollow(make: Any, config: Any) -> Iterator[Path]:
    """A checkpoint folder whose weights are zeros that take no room."""
    with torch.device("meta"):
        model = make(config)
    tied = {"lm_head.weight"} if config.get_text_config().tie_word_embeddings else set()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size = 0
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        end = size + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.config.architectures = [make.__name__]
        model.config.save_pretrained(folder)
        with (folder / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + size)
        yield folder


@torch.no_grad()
def _drawn(model: Any) -> Any:
    """Norm weights and scalars 1, matrices N(0, 0.02)."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    for index, parameter in enumerate(model.parameters()):
        part = parallel.local_part(parameter.data)
        if part.dim() < 2:
            part.fill_(1)
            continue
        own = part.shape != parameter.shape
        part.normal_(0, 0.02, generator=torch.Generator(part.device).manual_seed(1000 * index + (rank + 1) * own))
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(1)
    return model
