"""The drafter equals Hugging Face's assistant, request by request, over pages scattered differently in each pool."""

import copy
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma4_compile import demo_checkpoint, optimize
from gemma4_compile.assistant import load_assistant
from gemma4_compile.demo import DEMO_NAMES
from gemma4_compile.demo.evaluate import final_states
from gemma4_compile.geometry import geometry
from gemma4_compile.runtime.batch import KINDS
from gemma4_compile.runtime.drafter import Drafter, ordered_argmax
from gemma4_compile.runtime.memory import allocate, owners
from tests.runtime.demo_models import demo
from tests.runtime.host_recorder import HostRecorder

PAGE = 16
LENGTHS = (5, 16, 17, 100, 128, 129, 150, 300)  # tokens; the window is 128
DRAFTS = 6
PAGES = {"sliding_attention": 71, "full_attention": 89}


@dataclass
class Served:
    """Requests of a demo checkpoint: what a drafter is given, and what Hugging Face drafts from it."""

    target: Any
    assistant: Any
    kv: dict[str, Tensor]
    inputs: tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]
    hidden: list[Tensor]
    keys: list[dict[str, tuple[Tensor, Tensor]]]


@cache
def served(name: str) -> Served:
    """Keys and values by Hugging Face, put into pages at random; whatever no request owns is large, so that it shows."""
    found = demo(name)
    target, window = found.plain, found.plain.config.sliding_window
    assistant = load_assistant(demo_checkpoint(name) / "assistant", dtype=torch.float32).eval().requires_grad_(False)
    layout = geometry(target.config)
    kv = {
        name: tensor.fill_(50.0) for name, tensor in allocate(layout, PAGES, PAGE, torch.float32, torch.device("cpu")).items()
    }
    picks = {kind: random.Random(i).sample(range(1, PAGES[kind]), PAGES[kind] - 1) for i, kind in enumerate(KINDS)}
    tables = {kind: torch.zeros((len(LENGTHS), -(-max(LENGTHS) // PAGE)), dtype=torch.int32) for kind in KINDS}
    texts = found.prompts(len(LENGTHS), max(LENGTHS) + 1)
    longest = max(texts, key=len)
    tokens, positions, hidden, keys = [], [], [], []
    for row, length in enumerate(LENGTHS):
        text = longest[:length]
        with torch.no_grad():
            states, stored = final_states(target, torch.tensor([text]))
            tokens.append(int(target(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        for kind in KINDS:
            owner = owners(layout, kind)[-1].index
            pages = [picks[kind].pop() for _ in range(-(-length // PAGE))]
            tables[kind][row, : len(pages)] = torch.tensor(pages)
            slots = torch.tensor([pages[i // PAGE] * PAGE + i % PAGE for i in range(length)])
            for tensor, rows in zip(("keys", "values"), stored[kind], strict=True):
                kv[f"{tensor}.{owner}"].flatten(0, 1)[slots] = rows[0].transpose(0, 1)
        # transformers' own window lets one more key in than the target's, whose page may be gone: its cache has none either.
        seen = {kind: length if kind == "full_attention" else window for kind in KINDS}
        keys.append({kind: tuple(x[:, :, -seen[kind] :] for x in stored[kind]) for kind in KINDS})  # type: ignore[misc]
        positions.append(length - 1)
        hidden.append(states[:, -1:])
    inputs = torch.tensor(tokens), torch.cat(hidden)[:, 0], torch.tensor(positions), tables
    return Served(target, assistant, kv, inputs, hidden, keys)


@torch.no_grad()
def expected(name: str, drafts: int, shift: int) -> tuple[Tensor, Tensor]:
    """Drafts [R, K] and the states [R, K, H] that each step passes on, by Hugging Face, a request at a time."""
    given = served(name)
    chosen, passed = [], []
    for row in range(len(LENGTHS)):
        token, hidden = given.inputs[0][row].view(1, 1), given.hidden[row]
        positions = given.inputs[2][row].view(1, 1) + shift
        for _ in range(drafts):
            embedded = given.target.model.embed_tokens(token)
            out = given.assistant(
                inputs_embeds=torch.cat([embedded, hidden], dim=-1), position_ids=positions, shared_kv_states=given.keys[row]
            )
            token, hidden = out.logits.argmax(-1), out.last_hidden_state
            chosen.append(token)
            passed.append(hidden)
    count = len(LENGTHS)
    return torch.cat(chosen).view(count, drafts), torch.cat(passed).view(count, drafts, -1)


@cache
def optimized(name: str) -> Any:
    return optimize(demo(name).served.requires_grad_(False))


def drafter(name: str, drafts: int = DRAFTS, **options: Any) -> Drafter:
    given = served(name)
    return Drafter(optimized(name), given.assistant, drafts, given.kv, **options)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", DEMO_NAMES)
def test_drafts_are_hugging_faces(name: str, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests in one batch, below and beyond the window: each step's tokens, and the states that it passes on."""
    made = drafter(name, rope_offset=shift)
    states = []
    run = made.program.run
    monkeypatch.setattr(made.program, "run", lambda inputs: states.append(run(inputs)) or states[-1])
    tokens, passed = expected(name, DRAFTS, shift)
    drafts = made.draft(*served(name).inputs)
    assert drafts.dtype == torch.int64 and drafts.tolist() == tokens.tolist()
    torch.testing.assert_close(torch.stack([s.hidden for s in states], 1), passed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_nothing_is_written(name: str) -> None:
    given = served(name)
    before = {key: tensor.clone() for key, tensor in given.kv.items()}
    drafter(name, recorder=HostRecorder()).draft(*given.inputs)
    assert all(torch.equal(given.kv[key], tensor) for key, tensor in before.items())
