"""vLLM's norm where its IR is switched off: what its own implementation is in plain operations, as templates.

So in vLLM's compile mode 2, which is that of its CPU builds. Captured from vLLM's function, in each dtype, as it casts.
"""

from functools import cache
from typing import Any

import torch

from gemma4_compile.passes import PatternPass
from gemma4_compile.patterns.capture import capture
from gemma4_compile.patterns.rewrite import Guard, Rewrite, same_dtype, vectors_of_last_dim
from gemma4_compile.patterns.rms_norm import EPS, inputs_plain, inputs_scaled, replace_plain, replace_scaled
from gemma4_compile.patterns.template import Match, Template, trace, value_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def captured(dtype: torch.dtype, with_weight: bool) -> Template:
    """vLLM's own implementation of its norm, as Dynamo traces it."""
    from vllm import ir

    native = ir.ops.rms_norm.impls["native"].impl_fn
    x, weight = torch.randn(3, 16, dtype=dtype), torch.rand(16, dtype=dtype)
    if with_weight:
        return capture(lambda x, weight: native(x, weight, EPS), {"x": x, "weight": weight}, {"eps": EPS}, source=native)
    return capture(lambda x: native(x, None, EPS), {"x": x}, {"eps": EPS}, source=native)


def _of(dtype: torch.dtype, *guards: Guard) -> Guard:
    def guard(match: Match) -> str | None:
        x = value_of(match.binding["x"])
        if x is None or x.dtype != dtype:
            return f"x must be {dtype}"
        return next((reason for each in guards if (reason := each(match)) is not None), None)

    return guard


@cache
def _rewrites(raised: bool) -> tuple[Rewrite, ...]:
    found = []
    for dtype in _DTYPES:
        scaled = _of(dtype, same_dtype("x", "weight"), vectors_of_last_dim("x", "weight"))
        forms: tuple[tuple[str, Any, Any, Any, Guard], ...] = (
            ("rms_norm", captured(dtype, True), trace(replace_scaled), inputs_scaled, scaled),
            ("rms_norm_noscale", captured(dtype, False), trace(replace_plain), inputs_plain, _of(dtype)),
        )
        for name, native, op, inputs, guard in forms:
            search, replace = (native, op) if raised else (op, native)
            found.append(Rewrite(name, search, replace, inputs, guard))
    return tuple(found)


RAISE = PatternPass("vllm_norms", lambda: _rewrites(True), lowered=True)
LOWER = PatternPass("vllm_lower", lambda: _rewrites(False), lowered=True)
