"""What happens to logits around the sampler: penalties before it, log-probabilities after it. Plain PyTorch, no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_compile.ops.library import expect


def apply_penalties(
    logits: Tensor, counts: Tensor, prompt_seen: Tensor, slots: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Lower the logits of tokens that a request has in its prompt or has sampled.

    logits       [N, V]      fp32, fp16 or bf16
    counts       [S, V]      integers: how often the request in each slot has sampled each token
    prompt_seen  [S, V] bool tokens of its prompt
    slots        [N] int64   the slot of each row
    repetition   [N] fp32    for tokens of prompt or output: positive logits are divided, others multiplied by it; 1: none
    presence     [N] fp32    subtracted once from tokens of the output; 0: none
    frequency    [N] fp32    subtracted as often as the output has the token; 0: none
    returns      [N, V] fp32, new

    Raises ValueError for shapes that do not fit. Source: RepetitionPenaltyLogitsProcessor (transformers); the other two
    are those of the OpenAI API, in vLLM's order.
    """
    op = "apply_penalties"
    expect(op, "logits must be [N, V]", logits.dim(), 2, "pass the rows that ask for a token")
    expect(op, "counts must be [S, V] for logits [N, V]", counts.shape[1:], logits.shape[1:], "keep a count for each token")
    expect(op, "prompt_seen must have the shape of counts", prompt_seen.shape, counts.shape, "keep both by slot")
    for name, value in {"slots": slots, "repetition": repetition, "presence": presence, "frequency": frequency}.items():
        expect(op, f"{name} must be [N] for logits [N, V]", value.shape, logits.shape[:1], "pass one a row")
    sampled = counts[slots]
    present = sampled > 0
    factor = torch.where(present | prompt_seen[slots], repetition[:, None], 1.0)
    x = logits.float()
    x = torch.where(x > 0, x / factor, x * factor)
    return x - frequency[:, None] * sampled - presence[:, None] * present


def logprobs_of(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of chosen tokens and of the likeliest ones.

    logits   [N, V]           fp32, fp16 or bf16
    tokens   [N] int64        the chosen token of each row
    top      0..V
    returns  chosen           [N] fp32, log softmax of the chosen tokens
             ranks            [N] int64, 1 for a token that no other exceeds
             top_values       [N, top] fp32, falling
             top_ids          [N, top] int64, equals in no set order

    Raises ValueError for shapes that do not fit.
    """
    op = "logprobs_of"
    expect(op, "logits must be [N, V]", logits.dim(), 2, "pass the rows that ask for a token")
    expect(op, "tokens must be [N] for logits [N, V]", tokens.shape, logits.shape[:1], "pass one a row")
    expect(op, "top must lie in 0..V", bool(0 <= top <= logits.shape[1]), True, "ask for fewer")
    total = logits.float().logsumexp(dim=1, keepdim=True)
    chosen = logits.gather(1, tokens[:, None])
    ranks = (logits > chosen).sum(dim=1) + 1
    top_values, top_ids = logits.topk(top, dim=1)
    return (chosen.float() - total)[:, 0], ranks, top_values.float() - total, top_ids
