"""Where each fusion pays: plain data, measured, for the passes to read. Nothing here is computed at run time.

The numbers are of one run of `python scripts/bench_ops.py --out benchmarks/ops-h200.json` on an H200, those of the products
of `python scripts/bench_linear.py --out benchmarks/linear-h200.json`, those of the experts and of attention_qkv of
`scripts/bench_experts.py` and `scripts/bench_attention_qkv.py` on an H100; docs/fusions.md prints them, and
tests/ops/test_measured.py holds this file to them. A range of token counts is inclusive, None is no upper end; within it no
measured model was more than 3% slower than Inductor's own code for the same subgraph.
"""

from __future__ import annotations

from dataclasses import dataclass

BENCHMARK = "benchmarks/ops-h200.json"
PRODUCTS_BENCHMARK = "benchmarks/linear-h200.json"
ATTENTION_QKV_BENCHMARK = "benchmarks/attention-qkv-h100.json"
EXPERTS_BENCHMARK = "benchmarks/experts-h100.json"
Ranges = tuple[tuple[int, int | None], ...]
ALWAYS: Ranges = ((1, None),)


@dataclass(frozen=True)
class Measured:
    """One fusion: on by default or not and why, and for each of its ops the token counts at which it pays."""

    on_by_default: bool
    pays: dict[str, Ranges]
    why_off: str = "no faster than Inductor"


FUSIONS: dict[str, Measured] = {
    "post_attention_norms": Measured(True, {"post_attention_norm": ALWAYS, "post_attention_norms": ALWAYS}),
    "feed_forward_tail": Measured(
        True,
        {
            "feed_forward_tail": ALWAYS,
            "feed_forward_tail_norm": ALWAYS,
            "moe_feed_forward_tail": ALWAYS,
            "moe_feed_forward_tail_norm": ALWAYS,
        },
    ),
    "ple_tail": Measured(True, {"ple_tail": ALWAYS, "ple_tail_norm": ALWAYS}),
    "ple_inputs": Measured(True, {"ple_inputs": ALWAYS, "ple_combine": ALWAYS}),
    "route": Measured(True, {"route": ALWAYS}),
    # With more tokens than pay (experts_plan), the products are torch's grouped ones, as Inductor's are.
    "experts": Measured(True, {"experts": ALWAYS}),
    # Queries alone: as fast as Inductor up to 64 tokens (it has one kernel there too), faster from 128 on.
    "qkv_norm_rope": Measured(True, {"qkv_norm_rope": ALWAYS, "q_norm_rope": ((128, None),)}),
    # Without ranges: Inductor has no code for it, so it is measured against the two ops that it replaces, qkv_norm_rope and
    # attention (scripts/bench_attention_qkv.py).
    "attention_qkv": Measured(True, {}),
    # With more rows than pay (product_plan), the products are cuBLAS's, as Inductor's are.
    "gate_up": Measured(True, {"gate_up": ALWAYS}),
    "linear": Measured(True, {"linear": ALWAYS, "linear_pair": ALWAYS, "linear_triple": ALWAYS}),
    # Inductor's kernel is at the copy bandwidth; ours gains a little up to 128 tokens and loses 3 to 6% in prefills.
    "geglu": Measured(False, {"geglu": ((1, 128),)}),
    # Without ranges: the op chooses between its own kernel and NCCL by the size of the message (plans.one_shot_pays), and is
    # measured against NCCL and Inductor's code on two GPUs by scripts/bench_all_reduce.py.
    "all_reduce_norm": Measured(True, {}),
}


def pays(op: str, tokens: int) -> bool:
    """Whether gemma4::op beat or equalled Inductor at this many tokens, whatever its fusion's default."""
    ranges = next(fusion.pays[op] for fusion in FUSIONS.values() if op in fusion.pays)
    return any(low <= tokens and (high is None or tokens <= high) for low, high in ranges)
