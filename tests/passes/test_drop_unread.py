"""drop_unread: what nothing reads goes, chains of it too; what writes stays."""

from torch import Tensor

from tests.passes.harness import assert_same, compile_passes, rows


def unread(x: Tensor) -> Tensor:
    x.transpose(0, 1).to(x.dtype)
    x[:1].view(-1)
    return x * 2


def written(x: Tensor) -> Tensor:
    y = x * 2
    y.view(-1).mul_(3)
    return y


def test_unread_views_go() -> None:
    done = compile_passes(unread, ())
    assert_same(done.call(rows(2, 3)), unread(rows(2, 3)))
    (graph,) = done.graphs
    assert [node.op for node in graph.nodes] == ["placeholder", "call_function", "output"]


def test_writes_stay() -> None:
    done = compile_passes(written, ())
    assert_same(done.call(rows(2, 3)), written(rows(2, 3)))
