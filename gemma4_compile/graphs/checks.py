"""What a graph may hold, and whether its replay is right."""

from torch import Tensor

from gemma4_compile.packed.program import Program


class CaptureRefused(Exception):
    """A graph would keep something that the host decides anew for each step. Says what, and what to do."""


def difference(replayed: Tensor, expected: Tensor) -> str:
    """How far a replay is from what it should have given, as rms; empty if it is near enough. Waits for the device."""
    rms = (replayed.float() - expected.float()).square().mean().sqrt()
    scale = expected.float().square().mean().sqrt()
    # Written so that it holds too where either is not a number.
    return "" if rms <= 1e-2 * scale else f"rms {rms:.3g} of {scale:.3g}"


def check_on_gpu(inputs: dict[str, Tensor]) -> None:
    for name, tensor in inputs.items():
        if tensor.device.type != "cuda":
            raise CaptureRefused(f"a graph reads its inputs on the GPU, got {name} on {tensor.device}; move it there")


def check_host(program: Program) -> None:
    """Raises CaptureRefused for a piece that works on the host."""
    for call in program.spec.calls:
        if call.host:
            raise CaptureRefused(f"a graph cannot hold {call.host}: the host decides it anew for each step; run without graphs")


def check_pieces(program: Program) -> None:
    check_host(program)
    before = {index for step in program.steps[: program.boundary] for index in step.results}
    for step in program.steps[program.boundary + 1 :]:
        if before & set(step.arguments):
            raise CaptureRefused("steps behind the boundary must read what its piece passes on, got values from before it")
