"""The two small products of a PLE tail with tensor cores, for 3 to 128 tokens; they round as those of ple_tail.py do.

Both are a wait for the kernel before and one for memory, so what counts is what stands between the two waits and the result.
Weights are in registers before the first wait. Triton hands operands to tensor cores through shared memory, unless a thread has
loaded what it is to multiply. Here it has: a warp loads 8 rows of 32 columns with 16 bytes a thread, where a thread's 8 columns
are not those that the tensor core gives it, but they may be: a sum does not ask for their order, if it is the same in both
operands. So the order is changed in name alone (`fragments`), and only the gate's sum between warps goes through shared memory.
"""

from __future__ import annotations

from torch import Tensor

from gemma4_compile.ops.dependent import behind, first, ready, start
from gemma4_compile.ops.library import constant, gelu_tanh, jit, power_of_two, rounded, tl
from gemma4_compile.ops.plans import PleDotPlan

_OUTPUTS = constant(16)  # of a warp's tensor core: rows of weights
_BLOCK = constant(512)  # columns of a program's load


@jit
def fragment_places(TILES: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr):
    """Of what `fragments` takes, [TILES * COLUMNS // 32 * SLICES * 8, 32]: row, slice and the column in it.

    A flat first dimension: a warp has the 8 rows of a slice, the warps the slices, and a thread all that is above."""
    place = tl.arange(0, TILES * COLUMNS // 4 * SLICES)[:, None]
    tile, part = place // (COLUMNS // 4 * SLICES), place // (8 * SLICES) % (COLUMNS // 32)
    return tile * 8 + place % 8, place // 8 % SLICES, part * 32 + tl.arange(0, 32)[None, :]


@jit
def fragments(loaded, TILES: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr):
    """[SLICES, TILES * 8, COLUMNS] with the columns of each 32 in the order in which no thread needs another's."""
    split = tl.reshape(loaded, (TILES, COLUMNS // 32, SLICES, 8, 4, 2, 2, 2))
    return tl.reshape(tl.permute(split, (2, 0, 3, 1, 5, 6, 4, 7)), (SLICES, TILES * 8, COLUMNS))


@jit
def sum_over_warps(sums, WARPS: tl.constexpr, OUTPUTS: tl.constexpr, TOKENS: tl.constexpr):
    """[WARPS, OUTPUTS, TOKENS] -> [TOKENS, OUTPUTS]. Halves are split, so that a thread gets all that it adds: a reduction goes
    through shared memory twice."""
    total = tl.reshape(tl.permute(sums, (0, 2, 1)), (WARPS, TOKENS * OUTPUTS))
    for halved in tl.static_range(4):
        if WARPS >> halved > 1:
            pairs = tl.reshape(total, (2, WARPS >> (halved + 1), TOKENS * OUTPUTS))
            low, high = tl.split(tl.permute(pairs, (1, 2, 0)))
            total = low + high
    return tl.reshape(total, (TOKENS, OUTPUTS))


@jit
def products_of_loaded(weights, xs, rows, SLICES: tl.constexpr, OUTPUTS: tl.constexpr, TOKENS: tl.constexpr):
    """Sums of weights @ xs, in fp32, when all of them are asked for.

    Left alone, ptxas (12.8) moves loads between the products and waits for memory twice and more. Neither does it move a load
    over a barrier nor a product out of a branch; rows > 0 always, which it cannot know."""
    sums = tl.zeros((SLICES, OUTPUTS, TOKENS), tl.float32)
    tl.debug_barrier()
    if rows > 0:
        for block in tl.static_range(len(weights)):
            sums = tl.dot(weights[block], xs[block], sums)
    return sums


@jit(do_not_specialize=["rows"])  # one compilation for all token counts
def _gate_dot_kernel(
    hidden_ptr, input_ptr, weight_ptr, gated_ptr, rows, hidden_stride, input_stride,
    WIDTH: tl.constexpr, P: tl.constexpr, TOKENS: tl.constexpr, SLICES: tl.constexpr, WARPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """gated[t, p] = gelu(hidden[t] . weight[p]) * input[t, p] for TOKENS values of t and 16 of p; SLICES of each block of
    columns are summed apart, one or more by each warp."""
    start(DEPENDENT)
    dtype = gated_ptr.dtype.element_ty
    COLUMNS: tl.constexpr = _BLOCK // SLICES
    BLOCKS: tl.constexpr = (WIDTH + _BLOCK - 1) // _BLOCK

    lane, piece, column = fragment_places(_OUTPUTS // 8, COLUMNS, SLICES)
    row = tl.program_id(0) * _OUTPUTS + lane
    weights = ()
    for block in tl.static_range(BLOCKS):
        place = block * _BLOCK + piece * COLUMNS + column
        loaded = tl.load(weight_ptr + row * WIDTH + place, (row < P) & (place < WIDTH), other=0.0)
        weights = weights + (fragments(loaded, _OUTPUTS // 8, COLUMNS, SLICES),)  # type: ignore[assignment]
    lane, piece, column = fragment_places(TOKENS // 8, COLUMNS, SLICES)
    token = tl.program_id(1) * TOKENS + lane
    column += piece * COLUMNS
    hidden_ptrs, there = hidden_ptr + token.to(tl.int64) * hidden_stride + column, token < rows
    output = tl.program_id(0) * _OUTPUTS + tl.arange(0, _OUTPUTS)[None, :]
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    present = (output < P) & (token < rows)
    input_ptrs = input_ptr + token.to(tl.int64) * input_stride + output
    gated_ptrs = gated_ptr + token.to(tl.int64) * P + output
    ready(DEPENDENT)
    xs = ()
    for block in tl.static_range(BLOCKS):
        loaded = tl.load(hidden_ptrs + block * _BLOCK, there & (block * _BLOCK + column < WIDTH), other=0.0)
        xs = xs + (tl.permute(fragments(loaded, TOKENS // 8, COLUMNS, SLICES), (0, 2, 1)),)  # type: ignore[assignment]
    per_layer = tl.load(input_ptrs, present, other=0.0).to(tl.float32)

    sums = products_of_loaded(weights, xs, rows, SLICES, _OUTPUTS, TOKENS)
    sums = tl.sum(tl.reshape(sums, (SLICES // WARPS, WARPS, _OUTPUTS, TOKENS)), axis=0)  # within a thread
    gate = rounded(sum_over_warps(sums, WARPS, _OUTPUTS, TOKENS), dtype)
    tl.store(gated_ptrs, rounded(gelu_tanh(gate), dtype) * per_layer, present)


@jit(do_not_specialize=["rows"])  # one compilation for all token counts
def _projection_dot_kernel(
    gated_ptr, weight_ptr, projected_ptr, rows,
    WIDTH: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, SLICES: tl.constexpr, WARPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """projected[t] = gated[t] @ weight.T for TOKENS values of t, 16 columns a warp; SLICES: sums apart of one another, as a sum
    waits for the one before it."""
    start(DEPENDENT)
    COLUMNS: tl.constexpr = BLOCK // SLICES

    lane, piece, column = fragment_places(_OUTPUTS // 8, COLUMNS, SLICES * WARPS)
    # Rows 0 and 8 of the tensor core, which a thread has both, are columns that lie together.
    row = (tl.program_id(0) * WARPS + piece % WARPS) * _OUTPUTS + lane % 8 * 2 + lane // 8
    column += piece // WARPS * COLUMNS
    loaded = tl.load(weight_ptr + row * P + column, (row < WIDTH) & (column < P), other=0.0)
    weight = fragments(loaded, _OUTPUTS // 8, COLUMNS, SLICES * WARPS)
    lane, piece, column = fragment_places(TOKENS // 8, COLUMNS, SLICES * WARPS)
    token = tl.program_id(1) * TOKENS + lane
    column += piece // WARPS * COLUMNS
    gated_ptrs, there = gated_ptr + token.to(tl.int64) * P + column, (token < rows) & (column < P)
    # As the threads have the sums: token / 8, token % 2, warp, lane / 4, lane % 4, which is token / 2 % 4.
    place = tl.arange(0, TOKENS * WARPS * 8)[:, None]
    token = tl.program_id(1) * TOKENS + place // (64 * WARPS) * 8 + place % 4 * 2 + place // (32 * WARPS) % 2
    output = (tl.program_id(0) * WARPS + place // 32 % WARPS) * _OUTPUTS + place // 4 % 8 * 2 + tl.arange(0, 2)[None, :]
    projected_ptrs, present = projected_ptr + token.to(tl.int64) * WIDTH + output, (token < rows) & (output < WIDTH)
    ready(DEPENDENT)
    gated = fragments(tl.load(gated_ptrs, there, other=0.0), TOKENS // 8, COLUMNS, SLICES * WARPS)

    sums = products_of_loaded((weight,), (tl.permute(gated, (0, 2, 1)),), rows, SLICES * WARPS, _OUTPUTS, TOKENS)
    total = tl.sum(tl.reshape(sums, (SLICES, WARPS, 2, 8, TOKENS // 8, 4, 2)), axis=0)
    tl.store(projected_ptrs, tl.reshape(tl.permute(total, (3, 5, 0, 2, 4, 1)), (TOKENS * WARPS * 8, 2)), present)


def launch_ple_dots(hidden: Tensor, inputs: Tensor, gate_weight: Tensor, projection_weight: Tensor, plan: PleDotPlan) -> Tensor:
    """Both products of some rows, of which there are; fp16 or bf16."""
    return launch_projection_dot(launch_gate_dot(hidden, inputs, gate_weight, plan), projection_weight, plan)


def launch_gate_dot(hidden: Tensor, inputs: Tensor, gate_weight: Tensor, plan: PleDotPlan) -> Tensor:
    (rows, width), p = hidden.shape, inputs.shape[1]
    gated = hidden.new_empty((rows, p))
    dependent, options = first(gate_weight)
    _gate_dot_kernel[(-(-p // 16), -(-rows // plan.gate_tokens))](
        hidden, inputs, gate_weight.contiguous(), gated, rows, hidden.stride(0), inputs.stride(0), width, p,
        plan.gate_tokens, plan.gate_slices, plan.gate_warps, dependent, num_warps=plan.gate_warps, **options,
    )  # fmt: skip
    return gated


def launch_projection_dot(gated: Tensor, projection_weight: Tensor, plan: PleDotPlan) -> Tensor:
    """Behind the kernel of the gate."""
    (rows, p), width = gated.shape, projection_weight.shape[0]
    projected, block = gated.new_empty((rows, width)), max(32, power_of_two(p))
    dependent, options = behind(projection_weight)
    _projection_dot_kernel[(-(-width // (16 * plan.warps)), -(-rows // plan.tokens))](
        gated, projection_weight.contiguous(), projected, rows, width, p, block, plan.tokens, min(plan.slices, block // 32),
        plan.warps, dependent, num_warps=plan.warps, **options,
    )  # fmt: skip
    return projected
