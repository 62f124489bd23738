"""Bytes that must move, on graphs small enough to count by hand. fp32: 4 bytes an element."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gemma4_compile.inspection.traffic import traffic

aten = torch.ops.aten


def moved(function: Callable[..., Any], *inputs: Tensor, only: str = "") -> tuple[dict[str, int], dict[str, int]]:
    """Bytes in and out of one kernel that computes all of the function, or its nodes of one target."""
    graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    nodes = [n for n in graph.nodes if n.op == "call_function" and (not only or str(n.target) == only)]
    read, written = traffic(nodes, {})
    return {value.name: value.bytes for value in read}, {value.name: value.bytes for value in written}


def test_matrix_product() -> None:
    read, written = moved(aten.mm.default, torch.rand(2, 3), torch.rand(3, 5))
    assert list(read.values()) == [24, 60] and list(written.values()) == [40]


def test_what_stays_inside_does_not_move() -> None:
    read, written = moved(lambda x: torch.sigmoid(x * 2) + x, torch.rand(7))
    assert list(read.values()) == [28] and list(written.values()) == [28]


def test_an_inner_value_that_is_read_outside_moves() -> None:
    read, written = moved(lambda x: (x * 2).exp().sum(), torch.rand(7), only="aten.mul.Tensor")
    assert list(read.values()) == [28] and written == {"mul": 28}


def test_views_move_nothing_and_expanded_rows_are_read_once() -> None:
    read, written = moved(lambda x, y: x.view(1, 8).expand(4, 8) + y, torch.rand(8), torch.rand(4, 8))
    assert sorted(read.values()) == [32, 128] and list(written.values()) == [128]


def test_a_slice_is_read_and_not_its_base() -> None:
    read, _ = moved(lambda x: x[:2] * 2, torch.rand(100, 3))
    assert list(read.values()) == [24]


@pytest.mark.parametrize("gather", [lambda table, rows: aten.embedding(table, rows), lambda table, rows: table[rows]])
def test_a_gather_reads_rows(gather: Callable[..., Tensor]) -> None:
    read, written = moved(gather, torch.rand(1000, 4), torch.tensor([3, 5]))
    assert sorted(read.values()) == [16, 32] and list(written.values()) == [32]


def test_a_scatter_writes_rows() -> None:
    def write(cache: Tensor, rows: Tensor, new: Tensor) -> Tensor:
        return cache.copy_(aten.index_put(cache, [rows], new))

    read, written = moved(write, torch.rand(1000, 4), torch.tensor([3, 5]), torch.rand(2, 4))
    assert sorted(read.values()) == [16, 32] and list(written.values()) == [32]


def test_a_scatter_into_a_copy_moves_all_of_it() -> None:
    def roll(cache: Tensor, rows: Tensor, new: Tensor) -> Tensor:
        return cache.copy_(aten.index_put(aten.roll(cache, [-1], [0]), [rows], new))

    _, written = moved(roll, torch.rand(1000, 4), torch.tensor([3, 5]), torch.rand(2, 4), only="aten.copy_.default")
    assert list(written.values()) == [16000]


def test_two_gathers_from_one_table() -> None:
    def both(table: Tensor, rows: Tensor, others: Tensor) -> Tensor:
        return aten.embedding(table, rows) + aten.embedding(table, others)

    read, _ = moved(both, torch.rand(1000, 4), torch.tensor([3, 5]), torch.tensor([7, 9]))
    assert sorted(read.values()) == [16, 16, 64]


def test_outputs_of_an_op_with_several() -> None:
    _, written = moved(lambda x: aten.topk(x, 2), torch.rand(3, 9))
    assert sorted(written.values()) == [24, 48]  # fp32 values, int64 indices
