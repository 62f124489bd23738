"""Arrays of the host on the device, and tensors of the device on the host, without waiting for either."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma4_compile.packed.pinned import PinnedRing
from gemma4_compile.packed.step_inputs import leaves, rebuilt

_ALIGN = 16  # bytes; what the widest loads of kernels ask for


class Staging:
    """One copy for all arrays of a step. On a CPU the tensors are the arrays."""

    def __init__(self, device: torch.device):
        self.device = device
        self._ring = PinnedRing(device)

    def send(self, step: Any) -> Any:
        """A StepInputs, or a part of one, of tensors on the device. On a GPU they are copied in stream order."""
        return rebuilt(step, self._copied(leaves(step)))

    def _copied(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        if self.device.type != "cuda":
            return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        offsets, total = {}, 0
        for name, array in arrays.items():
            offsets[name] = total
            total += -(-array.nbytes // _ALIGN) * _ALIGN
        taken = self._ring.take(total, max(2 * total, 1 << 16))
        pinned = taken[0]
        host = pinned.numpy()
        for name, array in arrays.items():
            start = offsets[name]
            host[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        packed = pinned[:total].to(self.device, non_blocking=True)
        self._ring.sent(taken)
        return {
            name: packed[offsets[name] : offsets[name] + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
            for name, array in arrays.items()
        }


_DTYPES = {
    np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32,
    np.dtype(np.bool_): torch.bool, np.dtype(np.uint8): torch.uint8,
}  # fmt: skip


class Fetched:
    """Tensors on their way to the host."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._event: torch.cuda.Event | None = None
        self._tensors = {name: t if t.is_cuda else t.clone() for name, t in tensors.items()}  # the next step writes there too
        for name, tensor in tensors.items():
            if tensor.is_cuda:
                self._tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._tensors[name].copy_(tensor, non_blocking=True)
                self._event = self._event or torch.cuda.Event()
        if self._event is not None:
            self._event.record()

    def wait(self) -> dict[str, Tensor]:
        """The tensors, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
