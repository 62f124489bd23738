"""Times of functions on the GPU, for tests that print them."""

from collections.abc import Callable
from typing import Any

import torch


def microseconds(function: Callable[[], Any]) -> float:
    """Median, in a CUDA graph. With collectives: their watchdog looks at events meanwhile, which global capture forbids."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    times = []
    for _ in range(50):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return torch.tensor(times).median().item()
