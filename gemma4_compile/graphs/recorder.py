"""Recording CUDA graphs: what turns a function of fixed tensors into something that can be replayed."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gemma4_compile.borrowed import Borrowed
from gemma4_compile.garbage import without_collection


class Recorder(Protocol):
    """Turns a function of fixed tensors into something that can be replayed."""

    def warm_up(self, function: Callable[[], Any]) -> None:
        """Run it once where it will be captured, so that kernels are loaded and workspaces exist."""

    def record(self, function: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        """(replay, what the function returned): a replay writes new contents to the same tensors."""

    def borrow(self, tensor: Tensor) -> Tensor:
        """The same memory without a claim on it: the pool may hand it to the next graph."""


class CudaRecorder:
    """CUDA graphs of one device, in one memory pool."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def warm_up(self, function: Callable[[], Any]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            function()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def record(self, function: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, as the one that listens to other ranks or a user's own, may use CUDA meanwhile.
        capture = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
        with torch.cuda.device(self.device), without_collection(), capture:
            results = list(function())
        self._graphs.add(graph)
        return graph.replay, results

    def close(self) -> None:
        """Destroy all graphs: NCCL waits for those that hold its kernels before it gives a group up."""
        torch.cuda.synchronize(self.device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()

    def borrow(self, tensor: Tensor) -> Tensor:
        size = tensor.untyped_storage().nbytes()
        if not size:  # nothing that a graph could be placed on
            return tensor
        memory = Borrowed(tensor.untyped_storage().data_ptr(), size, tensor.device).tensor()
        whole = memory[: size // tensor.element_size() * tensor.element_size()].view(tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
