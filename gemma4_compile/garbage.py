"""Python's collector of cyclic garbage, kept out of what it would disturb."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """No collection of cyclic garbage: an engine in it would destroy its graphs and unload its kernels, and CUDA gives up a
    capture amid which that happens. torch.cuda.graph once collected before it, and does no more."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
