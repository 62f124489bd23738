"""The passes as plain torch.compile options, without our backend."""

import torch

from gemma4_compile import inductor_options
from tests.models import prompt, tiny


def test_plain_torch_compile_runs_the_passes() -> None:
    model = tiny("e").requires_grad_(False)
    options = inductor_options()
    compiled = torch.compile(model, fullgraph=True, options=options | {"fx_graph_cache": False})
    with torch.no_grad():
        expected, actual = model(prompt(2, 6), use_cache=False).logits, compiled(prompt(2, 6), use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    (record,) = options["pre_grad_custom_pass"].records
    assert {site.fusion for site in record.sites} >= {"qkv_norm_rope", "post_attention_norms", "feed_forward_tail", "ple_tail"}
