"""What an inspection found, as plain data: the files, the page and the printed tables all read this and nothing else."""

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["gemm", "attention", "ours", "inductor", "collective", "other"]


@dataclass(frozen=True)
class Line:
    """A line of the model's source that a kernel computes, and the module that it ran in."""

    file: str  # from the package on: transformers/models/gemma4/modeling_gemma4.py
    line: int
    code: str
    module: str  # model.layers.3.mlp


@dataclass(frozen=True)
class Value:
    """An input or output of a kernel.

    name     the parameter's path, or the node of the post-grad graph
    shape    as compiled; sizes that vary have the value of the inspected call
    bytes    that the kernel must read or write of it: the rows of a table that it gathers, not the table
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Kernel:
    """One call that the compiled graph makes.

    index         place in the order of calls
    name          as in Inductor's code: triton_red_fused_add_3, extern_kernels.mm, torch.ops.gemma4.route.default
    kind          gemm | attention | ours (an op of this package) | inductor (generated code) | collective | other
    fusion        the fusion that made it, for `ours`
    layer         decoder layer, None for what belongs to none: the one that its outputs belong to, the first of several
    module        path of the innermost module that holds all it computes
    ops           targets of the post-grad graph's nodes in it
    lines         lines of the model's source in it, in program order
    nodes         nodes of Dynamo's graph that it computes: what ties a kernel to those that do the same work elsewhere
    bytes         that it must read and write, each value once
    launches      kernels that the GPU ran for it; on a CPU 1, a call counts as one
    microseconds  measured on the GPU, median over the steps; None without one
    code          its source: Inductor's kernel, ours, or the line that calls what others wrote
    """

    index: int
    name: str
    kind: Kind
    fusion: str
    layer: int | None
    module: str
    ops: tuple[str, ...]
    lines: tuple[Line, ...]
    nodes: tuple[str, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    bytes: int
    launches: int
    microseconds: float | None
    code: str


@dataclass(frozen=True)
class Outside:
    """GPU work of a step that no call in the compiled graph launched: masks and positions, copies of the cache."""

    name: str
    launches: int
    microseconds: float


@dataclass(frozen=True)
class Variant:
    """One way of compiling the step.

    name               "gemma4-compile", or "plain": the same step through Inductor without our passes
    compile_seconds    with the caches off, passes included
    busy_microseconds  the time in which the GPU ran at least one kernel, median over the steps; None without a GPU
    wall_microseconds  of a step launched from Python, without CUDA graphs and without the profiler
    """

    name: str
    kernels: tuple[Kernel, ...]
    outside: tuple[Outside, ...]
    compile_seconds: float
    busy_microseconds: float | None
    wall_microseconds: float | None

    def of_layer(self, layer: int | None) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in self.kernels if kernel.layer == layer)

    @property
    def launches(self) -> int:
        return sum(kernel.launches for kernel in self.kernels)

    @property
    def kernel_microseconds(self) -> float:
        """Of all kernels of a step, those outside the graph included."""
        return sum(k.microseconds or 0.0 for k in self.kernels) + sum(o.microseconds for o in self.outside)


@dataclass(frozen=True)
class Layer:
    """A decoder layer. `label` names its kind: "sliding", "full, shares KV of layer 13", "sliding, experts"."""

    index: int
    label: str


@dataclass(frozen=True)
class Unmatched:
    """Where a pattern was looked for and did not fit. `pattern` is its file:line, empty if none of them came near."""

    site: str
    reason: str
    pattern: str


@dataclass(frozen=True)
class PassRow:
    """One step of the pipeline. `expected` is None for steps that promise no number of sites; `left` counts the matched
    sites that stay with Inductor because the op does not pay at this size."""

    name: str
    milliseconds: float
    expected: int | None
    matched: int
    left: int
    changed_lines: int
    unmatched: tuple[Unmatched, ...] = ()


@dataclass(frozen=True)
class FusionRow:
    """What a fusion replaced, counted in the two compiled graphs. A kernel over several fusions counts for the one that took
    most of it.

    plain        launches of the plain graph's kernels that compute nothing but what this fusion matched
    now          launches of our graph's kernels that do
    plain_us     GPU time of the same, None without a GPU
    """

    name: str
    sites: int
    plain: int
    now: int
    plain_us: float | None = None
    now_us: float | None = None

    @property
    def saved(self) -> int:
        return self.plain - self.now


@dataclass(frozen=True)
class Inspection:
    """All of it. `step` says what was inspected: "decode, batch 1, context 1024, bfloat16"."""

    model: str
    step: str
    device: str
    versions: dict[str, str]
    layers: tuple[Layer, ...]
    passes: tuple[PassRow, ...]
    ours: Variant
    plain: Variant | None = None
    fusions: tuple[FusionRow, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def variants(self) -> tuple[Variant, ...]:
        return (self.ours,) if self.plain is None else (self.plain, self.ours)
