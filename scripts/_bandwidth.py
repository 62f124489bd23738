"""What both benchmarks measure the floor with."""

import statistics

import torch


def copy_bandwidth() -> float:
    """Bytes read plus written a second by a large device-to-device copy (a copy node in a CUDA graph is slower)."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return 2 * source.numel() * 4 / statistics.median(times)


def product_rate() -> float:
    """FLOPs a second of a large bf16 matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return 2 * 8192.0**3 / statistics.median(times)
