"""Requests of the demo checkpoints for tests of drafters, and what Hugging Face drafts for them."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gemma4_compile import demo_checkpoint, optimize
from gemma4_compile.demo.evaluate import final_states
from gemma4_compile.geometry import geometry
from gemma4_compile.graphs.buckets import Buckets
from gemma4_compile.graphs.dispatch import GraphRunner
from gemma4_compile.hf.assistant import load_assistant
from gemma4_compile.packed.inputs import KINDS, PlainKV, Request
from gemma4_compile.runtime.speculative.drafter import Drafter
from gemma4_compile.runtime.worker.memory import allocate
from gemma4_compile.runtime.worker.model import PackedModel
from tests.runtime.demo_models import demo

PAGE = 16
LENGTHS = (5, 16, 17, 100, 128, 129, 150, 300)  # tokens; the window is 128
DRAFTS = 6
PAGES = {"sliding_attention": 121, "full_attention": 131}


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
def served(name: str, device: str = "cpu") -> Served:
    """Keys and values by Hugging Face, put into pages at random: odd ones of the sliding pool, even ones of the other. What no
    request owns is large, so that it shows."""
    found = demo(name, device)
    target, window = found.plain, found.plain.config.sliding_window
    assistant = load_assistant(demo_checkpoint(name) / "assistant", dtype=torch.float32).eval().requires_grad_(False).to(device)
    layout = geometry(target.config)
    kv = {
        name: tensor.fill_(50.0) for name, tensor in allocate(layout, PAGES, PAGE, torch.float32, torch.device(device)).items()
    }
    picks = {kind: random.Random(i).sample(range(1 + i, 121, 2), 60 - i) for i, kind in enumerate(KINDS)}
    tables = {kind: torch.zeros((len(LENGTHS), -(-max(LENGTHS) // PAGE)), dtype=torch.int32) for kind in KINDS}
    texts = found.prompts(len(LENGTHS), max(LENGTHS) + 1)
    longest = max(texts, key=len)
    tokens, positions, hidden, keys = [], [], [], []
    for row, length in enumerate(LENGTHS):
        text = longest[:length]
        with torch.no_grad():
            states, stored = final_states(target, torch.tensor([text], device=device))
            tokens.append(int(target(torch.tensor([text], device=device), use_cache=False).logits[0, -1].argmax()))
        for kind in KINDS:
            owner = layout.kv_owners(kind)[-1].index
            pages = [picks[kind].pop() for _ in range(-(-length // PAGE))]
            tables[kind][row, : len(pages)] = torch.tensor(pages)
            slots = torch.tensor([pages[i // PAGE] * PAGE + i % PAGE for i in range(length)], device=device)
            for tensor, rows in zip(("keys", "values"), stored[kind], strict=True):
                kv[f"{tensor}.{owner}"].flatten(0, 1)[slots] = rows[0].transpose(0, 1)
        # transformers' own window lets one more key in than the target's, whose page may be gone: its cache has none either.
        seen = {kind: length if kind == "full_attention" else window for kind in KINDS}
        keys.append({kind: (k[:, :, -seen[kind] :], v[:, :, -seen[kind] :]) for kind, (k, v) in stored.items()})
        positions.append(length - 1)
        hidden.append(states[:, -1:])
    tables = {kind: table.to(device) for kind, table in tables.items()}
    inputs = torch.tensor(tokens, device=device), torch.cat(hidden)[:, 0], torch.tensor(positions, device=device), tables
    return Served(target, assistant, kv, inputs, hidden, keys)


@torch.no_grad()
def expected(name: str, drafts: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Drafts [R, K] and the states [R, K, H] that each step passes on, by Hugging Face, a request at a time."""
    given = served(name, device)
    chosen, passed = [], []
    for row in range(len(LENGTHS)):
        token, hidden = given.inputs[0][row].view(1, 1), given.hidden[row]
        positions = given.inputs[2][row].view(1, 1)
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
def optimized(name: str, device: str = "cpu") -> Any:
    return optimize(demo(name, device).served.requires_grad_(False))


def drafter(name: str, drafts: int = DRAFTS, device: str = "cpu", **options: Any) -> Drafter:
    given = served(name, device)
    return Drafter(optimized(name, device), given.assistant, drafts, given.kv, **options)


def rounds(
    name: str,
    drafts: int,
    prompts: list[list[int]],
    tokens: int,
    device: str = "cpu",
    recorder: Callable[[], Any] = lambda: None,
) -> tuple[list[list[int]], float]:
    """Greedy tokens of all prompts, drafted and verified in one batch, and the mean of accepted drafts.

    recorder  makes those of the graphs for the target's steps and for drafting
    """
    packed = PackedModel(optimized(name, device))
    capacity = 16 * -(-(max(map(len, prompts)) + tokens * (drafts + 1)) // 16)  # the fast ones run ahead
    kv = PlainKV(packed.geometry, len(prompts), capacity, torch.float32, device)
    wanted = len(prompts) * (drafts + 1)
    buckets = Buckets(decode=(wanted,), tokens=(512, 1024), rows=(len(prompts), wanted))
    graphs = GraphRunner(packed.program, kv.inputs([Request([2])]), len(prompts), buckets, recorder())
    made = Drafter(packed.model, served(name, device).assistant, drafts, kv.tensors, recorder=recorder(), width=1)
    requests = [Request(prompt) for prompt in prompts]
    logits, hidden = graphs.run(kv.inputs(requests))
    last = logits[0].argmax(-1)
    texts = [[int(token)] for token in last]
    accepted, count = 0, 0
    while min(map(len, texts)) < tokens:
        seen = [request.seen + len(request.tokens) for request in requests]
        tables = {kind: torch.arange(len(prompts), dtype=torch.int32, device=device)[:, None] for kind in KINDS}
        drafted = made.draft(last, hidden, torch.tensor(seen, device=device) - 1, tables).tolist()
        step = [Request([text[-1], *row], s, rows=range(drafts + 1)) for text, row, s in zip(texts, drafted, seen, strict=True)]
        logits, states = graphs.run(kv.inputs(step))
        chosen = logits[0].argmax(-1).view(len(prompts), -1).tolist()
        rows = []
        for i, (row, choice) in enumerate(zip(drafted, chosen, strict=True)):
            right = next((j for j in range(drafts) if row[j] != choice[j]), drafts)
            texts[i] += choice[: right + 1]
            requests[i] = Request(step[i].tokens[: right + 1], seen[i])
            rows.append(i * (drafts + 1) + right)
            accepted, count = accepted + right, count + 1
        hidden = states[rows]
        last = torch.tensor([text[-1] for text in texts], device=device)
    assert graphs.refused == {} and made.refused == {}
    return [text[:tokens] for text in texts], accepted / count
