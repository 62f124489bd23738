"""geglu: gelu_tanh(gate) * up.

Source: Gemma4TextMLP.forward (transformers). gelu is rounded to the input's dtype before the product.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gemma4_compile.ops.dependent import alone, start
from gemma4_compile.ops.library import as_rows, expect, fresh, gelu_tanh, jit, op, power_of_two, rounded, tl


def _check(op: str, gate: Tensor, up: Tensor) -> None:
    expect(op, "up must have gate's shape", up.shape, gate.shape, "pass the two projections of one input")
    expect(op, "up must have gate's dtype", up.dtype, gate.dtype, "cast one of them")


@jit
def _geglu_kernel(gate_ptr, up_ptr, out_ptr, width, gate_stride, up_stride, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    start(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width

    gate = tl.load(gate_ptr + row * gate_stride + column, inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, inside, other=0.0).to(tl.float32)

    out = rounded(gelu_tanh(gate), out_ptr.dtype.element_ty) * up

    tl.store(out_ptr + row * width + column, out, inside)


def launch_geglu(gate: Tensor, up: Tensor) -> Tensor:
    gates, ups, out = as_rows(gate), as_rows(up), fresh(gate)
    if out.numel():
        rows, width = gates.shape
        block = min(power_of_two(width), 1024)
        dependent, options = alone()
        _geglu_kernel[(rows, -(-width // block))](
            gates, ups, out, width, gates.stride(0), ups.stride(0), block, dependent, num_warps=4, **options
        )
    return out


@op(
    launch=launch_geglu,
    like="gate",
    check=_check,
    example=lambda d: (d.states(d.sizes.intermediate), d.states(d.sizes.intermediate)),
)
def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up.

    gate     [..., I]  fp32, fp16 or bf16
    up       [..., I]  gate.dtype
    returns  [..., I]  gate.dtype, contiguous

    Raises ValueError for shapes and dtypes that differ.
    """
    return F.gelu(gate, approximate="tanh") * up
