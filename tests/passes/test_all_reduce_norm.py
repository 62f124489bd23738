"""Pass tests of all_reduce_norm: numerics, near misses, dynamic shapes, in a group of one process.

Counts in the graphs of whole models are in test_all_reduce_models.py."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from gemma4_compile import ops
from tests.models import DEVICE
from tests.passes.harness import Run, assert_same, compile_passes, norm, rows
from tests.passes.one_process import alone

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the group of one process is gloo's: NOT tested with the kernels here")
FUSION = "all_reduce_norm"
NORMS = ("post_attention_norms", "feed_forward_tail")
POST, NEXT, DENSE, EXPERTS, HALF = norm(seed=1), norm(seed=2), norm(seed=3), norm(seed=4), norm(width=8)


def summed(x: Tensor, op: str = "sum", group: Any = None) -> Tensor:
    """The sum of a product over the ranks."""
    return over_ranks(x * 2, op, group)


def over_ranks(part: Tensor, op: str = "sum", group: Any = None) -> Tensor:
    everyone: Any = dist.group.WORLD
    return collectives.all_reduce(part, op, everyone if group is None else group)


def compiled(function: Callable[..., Any], enabled: tuple[str, ...] = (FUSION, *NORMS)) -> Run:
    return compile_passes(function, enabled)


def sums_left(done: Run) -> int:
    (graph,) = done.graphs
    return sum(str(node.target) == "_c10d_functional.all_reduce" for node in graph.nodes)


@pytest.fixture
def one_process() -> Iterator[None]:
    with alone():
        yield


def sandwich(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    hidden = residual + POST(summed(x))
    return hidden, NEXT(hidden)


def tail(x: Tensor, residual: Tensor) -> Tensor:
    return residual + POST(summed(x))


def norm_alone(x: Tensor, residual: Tensor) -> Tensor:
    return POST(summed(x)).relu() + residual


def two_branches(x: Tensor, residual: Tensor) -> Tensor:
    experts = summed(x.reshape(-1, 16) + 1).reshape(x.shape)
    return (residual + POST(DENSE(summed(x)) + EXPERTS(experts))) * ONE


ONE = torch.full((1,), 0.7)


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (sandwich, "all_reduce_post_attention_norm"),
        (tail, "all_reduce_feed_forward_tail"),
        (norm_alone, "all_reduce_rms_norm"),
        (two_branches, "all_reduce_moe_feed_forward_tail"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_unfused(one_process: None, function: Callable[..., Any], op: str, dtype: torch.dtype) -> None:
    for module in (POST, NEXT, DENSE, EXPERTS):
        module.to(dtype)
    global ONE
    ONE = ONE.to(dtype)
    x, residual = rows(2, 3, 16).to(dtype), rows(2, 3, 16, seed=6).to(dtype)
    done = compiled(function)
    with torch.no_grad():
        assert_same(done.call(x, residual), function(x, residual))
    assert done.ops == {op: 1} and sums_left(done) == 0
    for module in (POST, NEXT, DENSE, EXPERTS):
        module.float()
    ONE = ONE.float()


def test_dynamic_shape(one_process: None) -> None:
    done = compiled(two_branches)
    for tokens in (6, 9, 3):
        x, residual = rows(2, tokens, 16), rows(2, tokens, 16, seed=6)
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(residual, 1)
        with torch.no_grad():
            assert_same(done.call(x, residual), two_branches(x, residual))
    assert len(done.graphs) == 1 and done.records[0].matched(FUSION)


def read_elsewhere(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = summed(x)
    hidden = residual + POST(total)
    return hidden, NEXT(hidden), total


def largest(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    hidden = residual + POST(summed(x, "max"))
    return hidden, NEXT(hidden)


def product(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    hidden = residual + POST(summed(x, "product"))
    return hidden, NEXT(hidden)


def norm_of_halves(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Each half of a row has its own norm."""
    hidden = residual + HALF(summed(x).view(2, 3, 2, 8)).view(2, 3, 16)
    return hidden, NEXT(hidden)


def sum_of_the_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over the ranks of each rank's norm is not the norm of the sum."""
    hidden = residual + summed(POST(x))
    return hidden, NEXT(hidden)


def part_in_between(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    hidden = residual + POST(summed(x) + x)
    return hidden, NEXT(hidden)


def own_residual(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    part = x * 2
    hidden = part.relu() + POST(over_ranks(part))
    return hidden, NEXT(hidden)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (read_elsewhere, "is also used by"),
        (largest, "expected 'sum', found 'max'"),
        (product, "expected 'sum', found 'product'"),
        (norm_of_halves, "expected wait_tensor"),
        (sum_of_the_norm, "expected wait_tensor"),
        (part_in_between, "expected wait_tensor, found add"),
        (own_residual, "the residual is computed from part, this rank's part of the sum"),
    ],
)
def test_near_miss(one_process: None, function: Callable[..., Any], reason: str) -> None:
    _assert_missed(function, reason)


def _assert_missed(function: Callable[..., Any], reason: str) -> None:
    x, residual = rows(2, 3, 16), rows(2, 3, 16, seed=6)
    done = compiled(function)
    with torch.no_grad():
        assert_same(done.call(x, residual), function(x, residual))
    (record,) = done.records
    assert not record.matched(FUSION) and not any("all_reduce" in op for op in done.ops)
    reasons = [miss.reason for miss in record.misses if miss.fusion == FUSION]
    assert any(reason in r for r in reasons), reasons


def test_two_groups_are_not_one(one_process: None) -> None:
    other = dist.new_group([0])

    def of_two_groups(x: Tensor, residual: Tensor) -> Tensor:
        experts = summed(x.reshape(-1, 16) + 1, group=other).reshape(x.shape)
        return (residual + POST(DENSE(summed(x)) + EXPERTS(experts))) * ONE

    _assert_missed(of_two_groups, "both must be the same")


def test_one_branch_alone_is_not_both(one_process: None) -> None:
    def dense_alone(x: Tensor, residual: Tensor) -> Tensor:
        return (residual + POST(DENSE(summed(x)) + EXPERTS((x + 1).reshape(-1, 16).reshape(x.shape)))) * ONE

    _assert_missed(dense_alone, "expected wait_tensor")


def test_branches_joined_before_their_norms_would_be_another_result() -> None:
    """Why a layer with experts keeps its two sums: the numbers of one sum of both are others, whatever is done with them."""
    parts = [(rows(1, 4, 16, seed=s), rows(1, 4, 16, seed=10 + s)) for s in range(2)]
    dense, experts = (parts[0][i] + parts[1][i] for i in range(2))
    apart = DENSE(dense) + EXPERTS(experts)
    swapped = DENSE(experts) + EXPERTS(dense)  # the same sum of both
    assert torch.equal(dense + experts, experts + dense) and (apart - swapped).abs().max() > 0.1


def test_the_group_must_exist() -> None:
    with pytest.raises(RuntimeError):
        ops.all_reduce_norm("rms_norm", rows(2, 16), torch.ones(16), 1e-6, group="no such group")
