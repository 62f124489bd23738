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
