"""Training of an MTP assistant against its frozen target, and the token clusters of the ordered embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma4_compile.demo.evaluate import final_states
from scripts._demo_data import Batches
from scripts._demo_models import DRAFTS, FULL, SLIDING
from scripts._demo_target import run_steps


def balanced_clusters(vectors: Tensor, clusters: int, rounds: int = 20, seed: int = 0) -> Tensor:
    """k-means with clusters of one size over unit vectors: tokens grouped by cluster, int64 [V], a permutation.

    vectors  [V, H], V a multiple of clusters

    Each round gives places to the (token, cluster) pairs in falling order of their similarity.
    """
    points = F.normalize(vectors.float().cpu(), dim=-1)
    total, size = len(points), len(points) // clusters
    generator = torch.Generator().manual_seed(seed)
    centers = points[torch.randperm(total, generator=generator)[:clusters]]
    owner = torch.empty(total, dtype=torch.long)
    for _ in range(rounds):
        ranked = (points @ centers.T).flatten().argsort(descending=True).tolist()
        left, owner = [size] * clusters, owner.fill_(-1)
        owners = [-1] * total
        for pair in ranked:
            token, cluster = divmod(pair, clusters)
            if owners[token] < 0 and left[cluster]:
                owners[token] = cluster
                left[cluster] -= 1
        owner = torch.tensor(owners)
        sums = torch.zeros_like(centers).index_add_(0, owner, points)
        centers = F.normalize(sums, dim=-1)
    return owner.argsort(stable=True)


def draft_masks(length: int, window: int, device: str) -> dict[str, Tensor]:
    """Which keys the draft of row p reads, bool [1, 1, length, length]: 0 .. p, on sliding layers the last `window`."""
    p = torch.arange(length, device=device)[:, None]
    k = torch.arange(length, device=device)[None, :]
    full = k <= p
    return {FULL: full[None, None], SLIDING: (full & (k > p - window))[None, None]}


class Lesson(NamedTuple):
    """What the target makes of a batch of rows: ids [B, T], final states [B, T, H], keys and values by layer type, and which
    rows count, [B, T] bool."""

    ids: Tensor
    states: Tensor
    stored: dict[str, tuple[Tensor, Tensor]]
    counts: Tensor


def read_text(target: Any, batches: Batches) -> Lesson:
    """Of text, where all rows count."""
    rows = batches.next()[:, :-1]
    return Lesson(rows, *final_states(target, rows), torch.ones_like(rows, dtype=torch.bool))


def train_assistant(
    target: Any, assistant: Any, lesson: Callable[[], Lesson], steps: int, rate: float, device: str, label: str
) -> dict[str, Any]:
    """Distil the target's next-token distributions into DRAFTS unrolled draft steps.

    Row p drafts from the target's final state at p and token p + 1, at RoPE position p + 1, on keys 0 .. p; step j
    reads token p + j and the state that step j - 1 projected, and learns the target's distribution at p + j.
    """
    target.to(device).eval().requires_grad_(False)
    assistant.to(device).train()
    config = assistant.config
    window = config.get_text_config().sliding_window
    cluster_of: Tensor | None = None
    if config.use_ordered_embeddings:
        ordering = balanced_clusters(target.model.embed_tokens.weight, config.num_centroids)
        assistant.masked_embedding.token_ordering.copy_(ordering)
        cluster_of = (ordering.argsort() // (len(ordering) // config.num_centroids)).to(device)

    def loss_of() -> Tensor:
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
            rows, states, stored, counts = lesson()
            logits = target.lm_head(states)
            cap = target.config.final_logit_softcapping
            wanted = (torch.tanh(logits.float() / cap) * cap).softmax(-1)
            embedded = target.model.embed_tokens(rows)
        length = rows.shape[1] - DRAFTS
        masks = draft_masks(length, window, device)
        positions = torch.arange(1, length + 1, device=device)[None]
        keys = {kind: (k[:, :, :length], v[:, :, :length]) for kind, (k, v) in stored.items()}
        hidden = states[:, :length]
        losses = []
        for j in range(1, DRAFTS + 1):
            goal, counted = wanted[:, j : j + length], counts[:, j : j + length]
            with torch.autocast(device, dtype=torch.bfloat16):
                inputs = torch.cat([embedded[:, j : j + length], hidden.to(embedded.dtype)], dim=-1)
                state = assistant.model(
                    inputs_embeds=assistant.pre_projection(inputs),
                    attention_mask=masks,
                    position_ids=positions,
                    shared_kv_states=keys,
                    use_cache=False,
                    output_hidden_states=True,  # keeps transformers from cutting rows; the states are not used
                ).last_hidden_state
                hidden = assistant.post_projection(state)
                guess = assistant.lm_head(state)
                centers = None if cluster_of is None else assistant.masked_embedding.centroids(state)
            losses.append(-(goal * guess.float().log_softmax(-1)).sum(-1)[counted].mean())
            if cluster_of is not None and centers is not None:
                mass = torch.zeros_like(centers, dtype=torch.float).index_add_(2, cluster_of, goal)
                losses[-1] = losses[-1] + 0.3 * -(mass * centers.float().log_softmax(-1)).sum(-1)[counted].mean()
        return torch.stack(losses).mean()

    return run_steps(assistant, loss_of, steps, rate, device, label, decay=0.05)
