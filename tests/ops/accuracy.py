"""The measuring stick of the op tests: the error against fp64 may not exceed 1.5 times eager's own."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(actual: Tensor, eager: Tensor, exact: Tensor, factor: float = 1.5) -> None:
    """max|actual - exact| <= factor max|eager - exact|; exact is fp64, from a computation that never rounds down.

    Two fp32 units of the largest value are always allowed: all arithmetic is fp32, several operations follow each other, and no
    two orders of a sum agree.
    """
    assert exact.dtype == torch.float64
    assert actual.shape == eager.shape == exact.shape
    assert actual.dtype == eager.dtype
    assert actual.isfinite().all()
    if not exact.numel():
        return
    error = (actual.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    allowed = max(factor * eager_error, 2 * torch.finfo(torch.float32).eps * exact.abs().max().item())
    assert error <= allowed, f"error {error:.3g} against fp64, eager's own is {eager_error:.3g}"
