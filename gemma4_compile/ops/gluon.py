"""Gluon, the part of Triton in which a kernel says what each warp does, as far as it is installed; for kernels of Hopper.

Its names are stand-ins where there is no Triton, so that modules with kernels can be imported. It has no interpreter:
tests/ops/test_frontend.py compiles these kernels without a GPU, tests/gpu runs them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .library import INTERPRETED, triton

if triton is not None:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    gluon_jit = gluon.jit
    barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # Triton 3.6, 3.7
else:
    gl = hopper = mbarrier = async_copy = barrier = None

    def gluon_jit(kernel: Any = None, **_: Any) -> Any:
        return kernel if kernel is not None else gluon_jit


@gluon_jit
def gated_product(gate, up, DTYPE: gl.constexpr):
    """gelu_tanh(gate) * up of fp32 sums, rounded where Hugging Face rounds; gelu_tanh as in ops/library.py."""
    gate = gate.to(DTYPE).to(gl.float32)
    u = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    gelu = (gate / (1.0 + gl.exp(-2.0 * u))).to(DTYPE).to(gl.float32)
    return (gelu * up.to(DTYPE).to(gl.float32)).to(DTYPE)


@gluon_jit
def multiply_steps(
    a_buffers, b_buffers, a_full, b_full, empty, done, width, WARPS: gl.constexpr, APART: gl.constexpr
):  # fmt: skip
    """A tile's sums in fp32 from the steps in the buffers, `done` of all tiles before it; and how many are done then.

    APART: rows and weights have barriers of their own, else a_full is both's."""
    STAGES: gl.constexpr = a_buffers.shape[0]
    ROWS: gl.constexpr = a_buffers.shape[1]
    BLOCK: gl.constexpr = a_buffers.shape[2]
    OUTPUTS: gl.constexpr = b_buffers.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, OUTPUTS, 16])
    sums = gl.zeros([ROWS, OUTPUTS], gl.float32, SUMS)
    for begin in range(0, width, BLOCK):
        stage = done % STAGES
        mbarrier.wait(a_full.index(stage), done // STAGES & 1)
        if APART:
            mbarrier.wait(b_full.index(stage), done // STAGES & 1)
        started = hopper.warpgroup_mma(a_buffers.index(stage), b_buffers.index(stage).permute((1, 0)), sums, is_async=True)
        sums = hopper.warpgroup_mma_wait(1, [started])
        if begin > 0:
            barrier()
            mbarrier.arrive(empty.index((done - 1) % STAGES))
        done += 1
    sums = hopper.warpgroup_mma_wait(0, [sums])
    barrier()
    mbarrier.arrive(empty.index((done - 1) % STAGES))
    return sums, done


@gluon_jit
def results_of(sums, DTYPE: gl.constexpr, GATED: gl.constexpr):
    """The sums rounded; if gated, of which the first half of the columns is the gate's, geglu of the halves."""
    ROWS: gl.constexpr = sums.shape[0]
    HALF: gl.constexpr = sums.shape[1] // 2
    if GATED:
        gate, up = sums.reshape([ROWS, 2, HALF]).permute([0, 2, 1]).split()
        results = gated_product(gate, up, DTYPE)
    else:
        results = sums.to(DTYPE)
    return results


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether kernels of this kind run there."""
    if INTERPRETED or triton is None or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def blocks_of(matrix: Tensor, rows: int, columns: int) -> Any:
    """What the copy engine needs to read [rows, columns] of a bf16 matrix at once, swizzled for products.

    Columns have stride 1, and rows begin at multiples of 16 bytes."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)
