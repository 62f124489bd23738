"""Memory as a tensor that does not own it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Borrowed:
    """Bytes at an address, as an object of their own: what is made of it can be told from what is made of the owner.

    owner  kept as long as this object and the tensors made of it; None: whoever borrows keeps it otherwise
    """

    def __init__(self, address: int, size: int, device: torch.device, owner: Any = None):
        self.size, self._device, self._owner = size, device, owner
        described = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}
        setattr(self, "__cuda_array_interface__" if device.type == "cuda" else "__array_interface__", described)

    def tensor(self) -> Tensor:
        """Bytes [size]. It keeps this object, and so does every view of it."""
        if self._device.type == "cuda":
            return torch.as_tensor(self, device=self._device)
        return torch.from_numpy(np.asarray(self))
