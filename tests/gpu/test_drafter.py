"""Drafts of the kernels and of CUDA graphs are Hugging Face's; a round does not wait for the GPU."""

import pytest
import torch

from gemma4_compile.demo import DEMO_NAMES
from tests.runtime.demo_models import demo
from tests.runtime.drafted import DRAFTS, drafter, expected, rounds, served


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_drafts_are_hugging_faces(name: str) -> None:
    torch.set_float32_matmul_precision("highest")
    made = drafter(name, DRAFTS, "cuda")
    tokens, hidden, positions, tables = served(name, "cuda").inputs
    wanted, _ = expected(name, DRAFTS, "cuda")
    for count in (8, 5, 1, 8):
        cut = {kind: table[:count] for kind, table in tables.items()}
        assert made.draft(tokens[:count], hidden[:count], positions[:count], cut).tolist() == wanted[:count].tolist()
    assert made.refused == {}


def test_no_sync() -> None:
    made = drafter("e", 3, "cuda")
    inputs = served("e", "cuda").inputs
    made.draft(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.draft(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_drafting_and_verification(name: str) -> None:
    torch.set_float32_matmul_precision("highest")
    models = demo(name, "cuda")
    prompts = models.prompts(5, 140)
    texts, accepted = rounds(name, 3, prompts, 16, "cuda")
    assert texts == [models.generate(prompt, 16) for prompt in prompts]
    assert accepted > 0.5
