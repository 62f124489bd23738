"""Runs every kernel under Triton's interpreter and prints a line a case. Started by test_interpreter.py."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import traceback  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import cache, partial  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
import triton.runtime.interpreter as interpreter  # noqa: E402

from gemma4_compile.ops import OPS  # noqa: E402
from gemma4_compile.ops.examples import SMALL, Sizes, example  # noqa: E402
from tests.ops.kernel_cases import CASES, check_op  # noqa: E402

truncating, product_of_bits = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
patch_language, numpy_of = interpreter._patch_lang, cache(interpreter._get_np_dtype)
patched: set[int] = set()


def _rounding(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
    """Triton 3.6 and 3.7 truncate fp32 to bf16 in the interpreter; the hardware rounds to nearest even."""
    if source == tl.float32 and target == tl.bfloat16:
        values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32)).bfloat16()
        return values.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
    return truncating(data, source, target, mode)


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """Triton 3.6 and 3.7 multiply the bits of bf16 as if they were integers."""
    return product_of_bits(self, _wide(a), _wide(b), *rest)


def _wide(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return type(operand)((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _patch_once(fn: Callable) -> Any:
    """Triton looks through its whole language at each call of a kernel or a function of one, a third of the time, and takes its
    changes back behind a kernel. Here they stay."""
    if id(fn.__globals__) not in patched:  # of a module, which stays
        patch_language(fn)
        patched.add(id(fn.__globals__))
    return interpreter._LangPatchScope()


def _numpy_type(dtype: Any) -> np.dtype:
    """Triton writes down the table of all types at each look into it."""
    return np.dtype(np.uint64) if isinstance(dtype.scalar, tl.pointer_type) else numpy_of(dtype.scalar)


interpreter._patch_lang, interpreter._get_np_dtype = _patch_once, _numpy_type
interpreter._convert_float = _rounding
interpreter.InterpreterBuilder.create_dot = _dot
ODD = Sizes(hidden=37, q_heads=2, kv_heads=1, head_dim=20, intermediate=19, ple=5, layers=2, vocabulary=7, experts=5, top_k=2)


def attempt(name: str, check: Callable[[], None]) -> None:
    try:
        check()
        print(f"{name}: ok", flush=True)
    except Exception as error:  # every case gets its line; the test shows it
        print(f"{name}: {type(error).__name__} {' '.join(str(error).split())[-400:]}", flush=True)
        traceback.print_exc()


def run(cases: dict[str, Callable[[], None]]) -> None:
    """Each case with a line, one after the other on one thread."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    for name, case in cases.items():
        attempt(name, case)


def accurate(name: str) -> None:
    torch.manual_seed(0)  # one op's numbers do not depend on which others there are
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for sizes, tokens, batch in ((SMALL, 6, 2), (ODD, 1, 1)):
            check_op(name, example(name, sizes, tokens, dtype, batch=batch))


def main() -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    for name in OPS:
        attempt(name, partial(accurate, name))
    for name, case in CASES.items():
        attempt(name, partial(case, "cpu"))


if __name__ == "__main__":
    main()
