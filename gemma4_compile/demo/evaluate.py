"""Measures of a demo checkpoint: held-out loss, and how many draft tokens its assistant gets accepted.

Plain transformers only, nothing compiled: these numbers say what the checkpoint can do, not how fast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from gemma4_compile.demo.corpus import held_out_files
from gemma4_compile.hf.step_cache import CACHE


def final_states(target: Any, ids: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """What an assistant reads of its target: the final-normed states and the keys and values of each layer type.

    ids      [B, T] int64
    returns  hidden [B, T, H] and, per layer type, k and v [B, Hk, T, D] of the last layer of that type that stores them

    Read from a cache that forgets nothing: 5.23 returns no shared_kv_states for a target without KV-shared layers.
    """
    cache: Any = DynamicCache()
    hidden = target.model(ids, **{CACHE: cache}, use_cache=True).last_hidden_state
    return hidden, stored_by_kind(target.config, cache)


def stored_by_kind(config: Any, cache: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys and values of the last layer of each type that stores them, from a model's cache.

    config   of its text part
    """
    storing = config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers]
    return {kind: (cache.layers[i].keys, cache.layers[i].values) for i, kind in enumerate(storing)}


@torch.no_grad()
def held_out_loss(
    model: Any, tokenizer: Any, window: int = 1024, max_windows: int | None = None, batch: int = 16
) -> dict[str, float]:
    """Cross-entropy on the held-out modules, cut in windows that each begin with <bos> and see nothing before it.

    window       tokens of one window
    max_windows  stop after so many (None: all)
    returns      loss (nats a token), bits_per_byte, tokens
    """
    windows: list[list[int]] = []
    size = 0
    for _, text in held_out_files():
        ids = tokenizer.encode(text, add_special_tokens=False)
        for start in range(0, len(ids), window - 1):
            piece = ids[start : start + window - 1]
            windows.append([tokenizer.bos_token_id, *piece])
            size += sum(map(len, tokenizer.convert_ids_to_tokens(piece)))  # byte level: a character is a byte
            if len(windows) == max_windows:
                break
        if len(windows) == max_windows:
            break
    total, tokens = 0.0, 0
    for first in range(0, len(windows), batch):
        rows = windows[first : first + batch]
        width = max(map(len, rows))
        ids = torch.tensor([row + [-100] * (width - len(row)) for row in rows], device=model.device)
        logits = model(ids.clamp(min=0)).logits[:, :-1]  # padded on the right: causal, no mask needed
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        total += losses.item()
        tokens += sum(map(len, rows)) - len(rows)
    return {"loss": total / tokens, "bits_per_byte": total / math.log(2) / size, "tokens": tokens}


@torch.no_grad()
def greedy(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations (without the prompt, cut after <eos>); prompts of one length run as one batch."""
    ids = torch.tensor(prompts, device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, use_cache=True)[
        :, ids.shape[1] :
    ].tolist()
    eos = model.config.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in out]


@torch.no_grad()
def accepted_drafts(
    target: Any, assistant: Any, prompts: list[list[int]], new_tokens: int = 64, drafts: int = 3, shift: int = 1
) -> dict[str, Any]:
    """Mean accepted drafts a round under greedy verification, by a plain loop over exact keys and values.

    The target's greedy continuation is written first; what greedy verification accepts is then the common prefix of the
    drafts and that continuation. Position p is the last the target has seen, token p + 1 the one it has just chosen.

    prompts  token ids, all of one length
    drafts   draft tokens a round
    shift    RoPE position of the drafts: p + shift (transformers: 1)
    returns  mean (0 .. drafts), rounds, histogram (rounds with 0, 1, .. accepted)
    """
    histogram = [0] * (drafts + 1)
    for prompt, reply in zip(prompts, greedy(target, prompts, new_tokens), strict=True):
        row = prompt + reply
        ids = torch.tensor([row], device=target.device)
        hidden, stored = final_states(target, ids)
        p = len(prompt) - 1
        while p + 1 + drafts < len(row):
            keys = {kind: (k[:, :, : p + 1], v[:, :, : p + 1]) for kind, (k, v) in stored.items()}
            drafted = draft(target, assistant, ids[:, p + 1 : p + 2], hidden[:, p : p + 1], keys, p + shift, drafts)
            wanted = row[p + 2 : p + 2 + drafts]
            accepted = next((i for i in range(drafts) if drafted[i] != wanted[i]), drafts)
            histogram[accepted] += 1
            p += accepted + 1
    rounds = sum(histogram)
    mean = sum(i * n for i, n in enumerate(histogram)) / max(rounds, 1)
    return {"mean": mean, "rounds": rounds, "histogram": histogram}


def draft(
    target: Any, assistant: Any, token: Tensor, hidden: Tensor, keys: dict[str, tuple[Tensor, Tensor]],
    position: int, drafts: int,
) -> list[int]:  # fmt: skip
    """Draft tokens after `token`, greedily.

    token   [1, 1]     int64, the token chosen last
    hidden  [1, 1, H]  the target's final-normed state one position before it
    keys    per layer type, k and v [1, Hk, S, D] of the target's last layer that stores them
    """
    positions = torch.tensor([[position]], device=token.device)
    tokens: list[int] = []
    for _ in range(drafts):
        embedded = target.model.embed_tokens(token)
        out = assistant(inputs_embeds=torch.cat([embedded, hidden], dim=-1), position_ids=positions, shared_kv_states=keys)
        token, hidden = out.logits.argmax(dim=-1), out.last_hidden_state
        tokens.append(int(token))
    return tokens


@torch.no_grad()
def accepted_drafts_hf(
    target: Any, assistant: Any, prompts: list[list[int]], new_tokens: int = 64, drafts: int = 3
) -> dict[str, Any]:
    """The same measure through transformers' own `generate(assistant_model=...)`, counted by the target's forwards.

    returns  mean (new tokens a verification round, less the one that is free), rounds, exact (replies equal to greedy)
    """
    assistant.generation_config.num_assistant_tokens = drafts
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    tokens, exact = 0, 0
    hook = target.register_forward_hook(count)
    try:
        for prompt in prompts:
            ids = torch.tensor([prompt], device=target.device)
            out = target.generate(
                ids, attention_mask=torch.ones_like(ids), assistant_model=assistant, max_new_tokens=new_tokens,
                do_sample=False,
            )  # fmt: skip
            reply = out[0, len(prompt) :].tolist()
            calls -= 1  # the prefill
            tokens += len(reply) - 1
            before = calls
            exact += reply == greedy(target, [prompt], new_tokens)[0]
            calls = before
    finally:
        hook.remove()
    return {"mean": tokens / max(calls, 1) - 1, "rounds": calls, "exact": exact, "prompts": len(prompts)}
