"""Every op in fp64, rounding nowhere: what the errors of kernels and eager are measured against.

Written apart from the references: those round where Hugging Face rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_compile.ops.distributed.all_reduce_norm import FORMS, PREFIX
from gemma4_compile.ops.sampling.bitwise import ACCEPT, RESIDUAL, SAMPLE, gumbel, uniform


def exact(op: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The outputs of gemma4::op on args, computed in fp64."""
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    result = EXACT[op](*wide)
    return result if isinstance(result, tuple) else (result,)


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat((-high, low), -1) * sin[:, :, None]


def route(logits: Tensor, scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    values, indices = logits.softmax(-1).topk(top_k)
    return values / values.sum(-1, keepdim=True) * scale[indices], indices


def experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for token, place in indices.new_ones(indices.shape).nonzero().tolist():
        expert = int(indices[token, place])
        if 0 <= expert < gate_up.shape[0]:
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            out[token] += weights[token, place] * (down[expert] @ (F.gelu(gate, approximate="tanh") * up))
    return out


def tail(x: Tensor, residual: Tensor, weight: Tensor, scalar: Tensor | None, eps: float) -> Tensor:
    hidden = residual + norm(x, weight, eps)
    return hidden if scalar is None else hidden * scalar


def joined(dense: Tensor, experts: Tensor, dense_weight: Tensor, expert_weight: Tensor, eps: float) -> Tensor:
    return norm(dense, dense_weight, eps) + norm(experts.reshape(dense.shape), expert_weight, eps)


def ple(hidden: Tensor, inputs: Tensor, gate: Tensor, projection: Tensor) -> Tensor:
    return (F.gelu(hidden @ gate.T, approximate="tanh") * inputs) @ projection.T


def then(hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return hidden, norm(hidden, weight, eps)


def then_products(hidden: Tensor, weight: Tensor, eps: float, *matrices: Tensor, gated: bool = False) -> tuple[Tensor, ...]:
    products = [norm(hidden, weight, eps) @ matrix.T for matrix in matrices]
    return hidden, *([F.gelu(products[0], approximate="tanh") * products[1]] if gated else products)


def three_norms(x: Tensor, r: Tensor, w: Tensor, w1: Tensor, scale: Tensor, root: float, w2: Tensor, eps: float) -> tuple:
    hidden = r + norm(x, w, eps)
    return hidden, norm(hidden, w1, eps), norm(hidden, None, eps) * scale * root, norm(hidden, w2, eps)


def combine(tokens: Tensor, projection: Tensor, weight: Tensor, scale: float, combined: float, eps: float) -> Tensor:
    return (norm((projection * scale).reshape(tokens.shape), weight, eps) + tokens) * combined


def inputs(ids: Tensor, table: Tensor, embed_scale: Tensor, projection: Tensor, weight: Tensor, *rest: float) -> Tensor:
    tokens = (table[ids] * embed_scale).reshape(*ids.shape, -1, weight.shape[0])
    return combine(tokens, projection, weight, *rest)


def kept_softmax(x: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    falling = x.sort(descending=True).values
    p = x.where(x >= falling[top_k - 1], -torch.inf).softmax(0)
    falling = p.sort(descending=True).values
    p = p.where(p >= falling[int((falling.cumsum(0) < top_p * (1 - 1e-7)).sum())], 0)
    p = p.where(p >= min_p * p.max(), 0)
    return p / p.sum()


def verify(logits: Tensor, first: Tensor, counts: Tensor, drafts: Tensor, scores: Tensor, tokens: Tensor, *rest: Any) -> tuple:
    """By block, a request at a time, without shortcuts: every probability is divided out, nothing is an integer."""
    found = [
        verified(logits[f : f + n + 1], drafts[r, :n].tolist(), scores[r], tokens[r], *(t[r].item() for t in rest[:-1]))
        for r, (f, n) in enumerate(zip(first.tolist(), counts.tolist(), strict=True))
    ]
    return tuple(counts.new_tensor(values) for values in zip(*found, strict=True))


def verified(
    logits: Tensor, drafts: list[int], scores: Tensor, tokens: Tensor, temperature: float, top_k: int, top_p: float,
    min_p: float, seed: int, offset: int,
) -> tuple[int, int]:  # fmt: skip
    best = logits.argmax(1).tolist()
    if temperature == 0:
        accepted = next((i for i, draft in enumerate(drafts) if draft != best[i]), len(drafts))
        return accepted, best[accepted]
    p = [kept_softmax(row / temperature, top_k, top_p, min_p) for row in logits]
    q = [torch.zeros_like(row).scatter_(0, t, s.softmax(0)) for row, t, s in zip(logits, tokens, scores, strict=False)]
    key, place = (torch.tensor([number], device=logits.device) for number in (seed, offset))
    u = uniform(key, place, len(drafts), ACCEPT)[0].tolist() if drafts else []
    c, accepted, left = 1.0, 0, p[0] if not drafts else (p[0] - q[0]).clamp(min=0)
    for j, x in enumerate(drafts):
        c = min(1.0, c * (p[j][x] / q[j][x]).item())
        last = j + 1 == len(drafts)
        rest = p[j + 1] if last else (c * p[j + 1] - q[j + 1]).clamp(min=0)
        chance = c if last or c == 1 else (rest.sum() / (rest.sum() + 1 - c)).item()
        if u[j] < chance:
            accepted, left = j + 1, rest
    stream = SAMPLE if accepted == len(drafts) else RESIDUAL
    return accepted, int((left.log() + gumbel(key, place + accepted, len(left), stream)[0]).argmax())


def rope_2d(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([rope(*part) for part in zip(*(t.chunk(2, -1) for t in (x, cos, sin)), strict=True)], -1)


EXACT: dict[str, Callable[..., Any]] = {
    "rms_norm": norm,
    "rms_norm_noscale": lambda x, eps: norm(x, None, eps),
    "rope": rope,
    "rope_2d": rope_2d,
    "geglu": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "gate_up": lambda x, gate, up: F.gelu(x @ gate.T, approximate="tanh") * (x @ up.T),
    "linear": lambda x, weight: x @ weight.T,
    "linear_pair": lambda x, *weights: tuple(x @ weight.T for weight in weights),
    "linear_triple": lambda x, *weights: tuple(x @ weight.T for weight in weights),
    "norm_gate_up": lambda x, r, w, nw, gate, up, eps: then_products(r + norm(x, w, eps), nw, eps, gate, up, gated=True),
    "norm_linear": lambda x, r, w, s, nw, *rest: then_products(tail(x, r, w, s, rest[-1]), nw, rest[-1], *rest[:-1]),
    "norm_ple": lambda x, r, w, i, g, p, eps: (r + norm(x, w, eps), ple(r + norm(x, w, eps), i, g, p)),
    "route": route,
    "experts": experts,
    "post_attention_norm": lambda x, r, w, nw, eps: then(r + norm(x, w, eps), nw, eps),
    "post_attention_norms": three_norms,
    "feed_forward_tail": tail,
    "feed_forward_tail_norm": lambda x, r, w, s, nw, eps: then(tail(x, r, w, s, eps), nw, eps),
    "moe_feed_forward_tail": lambda d, e, r, dw, ew, w, s, eps: tail(joined(d, e, dw, ew, eps), r, w, s, eps),
    "moe_feed_forward_tail_norm": lambda d, e, r, dw, ew, w, s, nw, eps: then(
        tail(joined(d, e, dw, ew, eps), r, w, s, eps), nw, eps
    ),
    "ple_tail": lambda h, i, g, p, w, s, eps: tail(ple(h, i, g, p), h, w, s, eps),
    "ple_tail_norm": lambda h, i, g, p, w, s, nw, eps: then(tail(ple(h, i, g, p), h, w, s, eps), nw, eps),
    "ple_inputs": inputs,
    "ple_combine": combine,
    "qkv_norm_rope": lambda q, k, v, qw, kw, cos, sin, eps: (
        rope(norm(q, qw, eps), cos, sin),
        rope(norm(k, kw, eps), cos, sin),
        norm(v, None, eps),
    ),
    "qkv_norm_rope_2d": lambda q, k, v, qw, kw, cos, sin, eps: (
        rope_2d(norm(q, qw, eps), cos, sin),
        rope_2d(norm(k, kw, eps), cos, sin),
        norm(v, None, eps),
    ),
    "qkv_norm_rope_2d_clipped": lambda q, k, v, qw, kw, cos, sin, eps, bounds: (
        rope_2d(norm(q.clamp(*bounds[:2]), qw, eps), cos, sin),
        rope_2d(norm(k.clamp(*bounds[2:4]), kw, eps), cos, sin),
        norm(v.clamp(*bounds[4:]), None, eps),
    ),
    "q_norm_rope": lambda q, w, cos, sin, eps: rope(norm(q, w, eps), cos, sin),
    "verify": verify,
}
EXACT |= dict.fromkeys(("norm_linear_pair", "norm_linear_triple"), EXACT["norm_linear"])
EXACT |= {PREFIX + op: lambda *args, op=op: EXACT[op](*args[:-1]) for op in FORMS}  # type: ignore[misc]
