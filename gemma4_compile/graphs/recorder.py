"""Recording CUDA graphs: what turns a function of fixed tensors into something that can be replayed."""

import functools
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


class BlasWorkspaces:
    """Memory for cuBLAS' workspaces that nobody else is ever given.

    torch keeps one workspace for each handle and stream, and captured products write there at each replay. Inductor's
    CUDA graph trees give all of them back to the allocator before each of their own captures, and a replay would then
    write into whatever lies there by now. So workspaces are first asked for in a capture, and come from its pool: one
    that no other capture uses, and that a small graph keeps for the life of the process.
    """

    def __init__(self, device: torch.device):
        self._pool = torch.cuda.graph_pool_handle()
        self._product = torch.zeros(16, 16, device=device)
        self._keeper = self._capture(torch.cuda.Stream(device))

    def provide(self, stream: torch.cuda.Stream) -> None:
        """See to it that products of this thread on the stream have a workspace, here if they had none."""
        self._capture(stream)

    def _capture(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        torch.mm(self._product, self._product)  # this thread has a handle from here on: making one can't be captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
            torch.mm(self._product, self._product)
        return graph


@functools.cache
def blas_workspaces(device: torch.device) -> BlasWorkspaces:
    with torch.cuda.device(device):
        return BlasWorkspaces(device)


class CudaRecorder:
    """CUDA graphs of one device, in one memory pool."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def warm_up(self, function: Callable[[], Any]) -> None:
        with torch.cuda.device(self.device), without_collection():
            blas_workspaces(self.device).provide(self.stream)
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
