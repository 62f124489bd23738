"""lower: what raise made and no fusion took becomes the very code that was there before."""

import pytest
import torch

from tests.models import prompt, tiny
from tests.passes.harness import assert_same, compile_passes


@pytest.mark.parametrize("kind", ["e", "moe", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_raised_op_is_left(kind: str, dtype: torch.dtype) -> None:
    model = tiny(kind, dtype).requires_grad_(False)
    done = compile_passes(lambda ids: model(ids, use_cache=False).logits, set())
    with torch.no_grad():
        assert_same(done.call(prompt(2, 6)), model(prompt(2, 6), use_cache=False).logits)
    assert not done.ops
    assert {site.fusion for site in done.records[0].sites} >= {"rms_norm", "rope", "geglu"}


def test_new_nodes_know_where_they_come_from() -> None:
    """AOT's cache needs values, inspection needs module paths and stack traces: also on nodes that the passes made."""
    model = tiny("moe").requires_grad_(False)
    done = compile_passes(lambda ids: model(ids, use_cache=False).logits, {"qkv_norm_rope", "post_attention_norms"})
    with torch.no_grad():
        done.call(prompt(2, 6))
    for node in done.graphs[0].nodes:
        if node.op == "call_method":
            assert "example_value" in node.meta, node
        if "gemma4." in str(node.target):
            assert node.meta["nn_module_stack"] and node.meta["stack_trace"]
