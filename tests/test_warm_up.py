"""What the kernels' warm-up relies on; that it warms the right kernels, a GPU alone can tell."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from gemma4_compile.ops.library import product, without_products


def test_products_are_left_out_in_one_thread_for_a_time() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    with ThreadPoolExecutor(1) as other, without_products():
        left_out = product(x[..., :4], weight)  # which cannot be computed
        computed = other.submit(product, x, weight).result()
    assert (left_out.shape, left_out.dtype) == (computed.shape, computed.dtype)
    torch.testing.assert_close(computed, F.linear(x, weight))
    torch.testing.assert_close(product(x, weight), F.linear(x, weight))
