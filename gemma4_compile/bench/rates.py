"""What the benchmarks measure with: times of the GPU, its events, and the rates that floors are made of."""

import statistics
from collections.abc import Callable
from typing import Any

import torch


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of a call on the GPU, between two events."""
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def gpu_events(step: Callable[[], Any]) -> list[Any]:
    """The profiler's events of all kernels, copies and fills of a step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    return [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def copy_bandwidth() -> float:
    """Bytes read plus written a second by a large device-to-device copy (a copy node in a CUDA graph is slower)."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / median_seconds(lambda: target.copy_(source), 12)


def product_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOPs a second of a large matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * 8192.0**3 / median_seconds(lambda: a @ b, 12)
