"""Time gemma4::attention_qkv against the two ops that it replaces, qkv_norm_rope and attention, at the real models' sizes.

    python scripts/bench_attention_qkv.py [--tokens 1,8] [--fp8] [--out FILE]

Two comparisons a row, in microseconds an instance: norms, rotation and write alone, where the saved launch and bytes are, and
the whole with attention. Up to 64 tokens each is the next of a request behind 1024 keys, more are one prompt. Pages of 64.
Medians over replays of CUDA graphs that hold many instances on rotating buffers; the two sides' replays alternate.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from gemma4_compile.ops.attention import attention
from gemma4_compile.ops.examples import Sizes, example
from gemma4_compile.ops.fusions.attention_qkv import attention_qkv
from gemma4_compile.ops.fusions.qkv_norm_rope import launch_into_pages, qkv_norm_rope
from gemma4_compile.ops.library import fresh
from scripts.bench_ops import E2B, E2B_FULL, MOE, MOE_FULL, ROTATE_BYTES, TOKENS, launches, microseconds

LAYERS = {"E2B": (E2B, 512), "E2B full": (E2B_FULL, 0), "26B-A4B": (MOE, 1024), "26B-A4B full": (MOE_FULL, 0)}
PAGE, SEEN, MOST_REQUESTS = 64, 1024, 64


def step(sizes: Sizes, window: int, tokens: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Random arguments of attention_qkv; each request's pages lie apart from the others'."""
    requests, seen = (tokens, SEEN) if tokens <= MOST_REQUESTS else (1, 0)
    rows = tokens // requests
    width = -(-(seen + rows) // PAGE)
    shape = (requests * width, PAGE, sizes.kv_heads, sizes.head_dim)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(2))
    table = torch.randperm(requests * width, device="cuda").to(torch.int32).view(requests, width)
    positions = torch.arange(rows, device="cuda").repeat(requests) + seen
    owner = torch.arange(requests, device="cuda").repeat_interleave(rows)
    slots = table[owner, positions // PAGE].long() * PAGE + positions % PAGE
    starts = torch.arange(0, tokens + 1, rows, device="cuda", dtype=torch.int32)
    projections = example("qkv_norm_rope", sizes, tokens, torch.bfloat16, "cuda")
    return *projections, keys, values, slots, table, positions, starts, 0, window, 1.0


def apart(*args: Any) -> Tensor:
    q, k, v = qkv_norm_rope.launch(*args[:8])
    return attention.launch(q, k, v, *args[8:])


def norms_then_write(*args: Any) -> tuple[Tensor, ...]:
    """Attention of no rows writes and does nothing else."""
    q, k, v = qkv_norm_rope.launch(*args[:8])
    keys, values, slots, table, positions, *rest = args[8:]
    attention.launch(q[:, :0], k, v, keys, values, slots, table, positions[:0], *rest)
    return q, k, v


def norms_with_write(*args: Any) -> Tensor:
    out = fresh(args[0])
    launch_into_pages(out, *args[:11])
    return out


def measure(layer: str, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    first = step(*LAYERS[layer], tokens, dtype)
    size = sum(t.numel() * t.element_size() for t in first if isinstance(t, Tensor))
    count = int(min(32, max(16 if tokens <= 512 else 4, ROTATE_BYTES // size)))
    sets = [first, *(step(*LAYERS[layer], tokens, dtype) for _ in range(count - 1))]
    two, one = microseconds([norms_then_write, norms_with_write], sets)
    whole_two, whole_one = microseconds([apart, attention_qkv.launch], sets)
    return {
        "op": "attention_qkv",
        "model": layer,
        "tokens": tokens,
        "norms_then_write_us": round(two, 3),
        "norms_with_write_us": round(one, 3),
        "apart_us": round(whole_two, 3),
        "fused_us": round(whole_one, 3),
        "launches": [launches(apart, first), launches(attention_qkv.launch, first)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="comma-separated token counts")
    parser.add_argument("--fp8", action="store_true", help="pages of fp8")
    parser.add_argument("--out", type=Path, default=None, help="write the rows as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_attention_qkv needs a CUDA GPU; none is visible", file=sys.stderr)
        return 2
    dtype = torch.float8_e4m3fn if options.fp8 else torch.bfloat16
    rows = []
    with torch.no_grad():
        for layer in LAYERS:
            for tokens in map(int, options.tokens.split(",")):
                rows.append(row := measure(layer, tokens, dtype))
                two, one, apart_us, fused_us = (row[name] for name in list(row)[3:7])
                print(
                    f"{layer:13} {tokens:5} norms, write {two:8.2f} -> {one:8.2f} x{two / one:5.2f}   with attention"
                    f" {apart_us:9.2f} -> {fused_us:9.2f} x{apart_us / fused_us:5.2f}   launches {row['launches']}",
                    flush=True,
                )
    if options.out:
        about = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "pages": str(dtype).removeprefix("torch."),
            "command": "python scripts/bench_attention_qkv.py" + " --fp8" * options.fp8,
        }
        options.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
