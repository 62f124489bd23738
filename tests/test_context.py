"""Compiled in a context: autocast, tensors of other classes, default devices and dtypes, compilation switched off."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemma4_compile import Engine, EngineConfig, SamplingParams, optimize, report, restore
from gemma4_compile.calls.route import PACKED, UNCOMPILED, WHOLE
from gemma4_compile.passes import pipeline
from tests.models import prompt, tiny
from tests.passes.harness import compile_passes, passes_only

SMALL: dict[str, Any] = {"max_model_len": 64, "max_requests": 4, "max_batched_tokens": 32, "page_size": 16, "kv_bytes": 4 << 20}


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("cpu")
    yield
    torch.set_default_device(None)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


CONTEXTS: dict[str, Any] = {
    "default device": default_device, "default dtype": default_dtype, "a device around it": lambda: torch.device("cpu"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16), "inference mode": torch.inference_mode,
    "deterministic": deterministic, "stance": lambda: torch.compiler.set_stance("force_eager"),
}  # fmt: skip


def forget_patterns() -> None:
    for step in pipeline(("ple_inputs", "linear")):
        rewrites = getattr(step, "rewrites", None)
        if rewrites is not None and hasattr(rewrites, "cache_clear"):
            rewrites.cache_clear()


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.filterwarnings("ignore:gemma4_compile leaves the model plain")
@torch.no_grad()
def test_patterns_are_captured_in_a_state_of_their_own(context: str) -> None:
    """In whatever state the first model of a process is optimized, all of its sites match."""
    model = tiny("e").requires_grad_(False)
    wanted = model(prompt(1, 6), use_cache=False).logits
    forget_patterns()
    with CONTEXTS[context]():
        passes_only(model)
    actual = model(prompt(1, 6), use_cache=False).logits
    found = {name: (f.matched, f.expected) for name, f in report(model).fusions.items() if f.enabled}
    assert all(matched == expected for matched, expected in found.values()), found
    torch.testing.assert_close(actual, wanted, rtol=2e-5, atol=2e-5)
    forget_patterns()


@pytest.mark.parametrize(
    "context", ["default device", "a device around it", "default dtype", "inference mode", "deterministic"]
)
@torch.no_grad()
def test_packed_steps_are_traced_in_a_state_of_their_own(context: str) -> None:
    model = tiny("e").requires_grad_(False)
    wanted = model(prompt(1, 6)).logits
    passes_only(model)
    with CONTEXTS[context]():
        actual = model(prompt(1, 6)).logits
    assert report(model).calls == {PACKED: 1}
    assert all(f.matched == f.expected for f in report(model).fusions.values() if f.enabled)
    torch.testing.assert_close(actual, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:gemma4_compile runs this call")
@torch.no_grad()
@pytest.mark.slow
def test_autocast_leaves_the_sites_that_it_changes() -> None:
    """As torch.compile's own; the other fusions go on."""
    plain, model = tiny("e").requires_grad_(False), passes_only(tiny("e").requires_grad_(False))
    ids = prompt(2, 9)
    without = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        wanted, actual = plain(ids).logits, model(ids).logits
    assert wanted.dtype == actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    assert report(model).calls == {PACKED: 1, WHOLE: 1}
    reasons = {miss.reason for miss in report(model).fusions["gate_up"].unmatched}
    assert any("autocast makes" in reason for reason in reasons), reasons
    assert torch.equal(model(ids).logits, without)  # and after it all is as before


@torch.no_grad()
def test_autocast_within_a_function() -> None:
    """In the graph it is a node, and not the state in which it is compiled."""
    weight, other = torch.randn(16, 16), torch.randn(16, 16)

    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.linear(x, weight), nn.functional.linear(x, other)

    def cast(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return pair(x)

    for function, count in ((pair, 1), (cast, 0)):
        compiled = compile_passes(function, ("linear",))
        x = torch.randn(1, 3, 16)
        actual, wanted = compiled.call(x), function(x)
        assert compiled.ops["linear_pair.default"] + compiled.ops["linear_pair"] == count
        for mine, right in zip(actual, wanted, strict=True):
            torch.testing.assert_close(mine, right)


@torch.no_grad()
def test_ops_compute_in_their_inputs_dtype() -> None:
    x, weight = torch.randn(1, 3, 16), torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ops.gemma4.linear(x, weight).dtype == torch.float32


@torch.no_grad()
def test_an_engine_refuses_autocast() -> None:
    plain, model = tiny("dense").requires_grad_(False), passes_only(tiny("dense").requires_grad_(False))
    engine = Engine(model, EngineConfig(**SMALL))
    given = prompt(1, 9)[0].tolist()
    wanted = plain.generate(torch.tensor([given]), max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, 9:].tolist()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="got autocast around it; leave it"):
        engine.add_request(given)
    request = engine.add_request(given, SamplingParams(max_tokens=4, ignore_eos=True))
    found: list[int] = []
    with torch.autocast("cpu", torch.bfloat16):  # of whoever drives it
        while engine.has_work:
            found += [token for chunk in engine.step() if chunk.request_id == request for token in chunk.token_ids]
    assert found == wanted


class Odd(Tensor):
    """A weight that is quantized, say."""


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.12", reason="open: Dynamo of torch 2.11 does not say what class such a weight has")
@pytest.mark.filterwarnings("ignore:gemma4_compile runs this call")
@torch.no_grad()
def test_tensors_of_other_classes_are_left_to_inductor() -> None:
    plain, model = tiny("dense").requires_grad_(False), tiny("dense").requires_grad_(False)
    layer: Any = model.model.layers[0].mlp.gate_proj
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Odd), requires_grad=False)
    optimize(model)
    torch.testing.assert_close(model(prompt(1, 5)).logits.as_subclass(Tensor), plain(prompt(1, 5)).logits, rtol=2e-5, atol=2e-5)
    assert PACKED not in report(model).calls


def test_compilation_that_is_switched_off() -> None:
    plain, model = tiny("dense").requires_grad_(False), tiny("dense").requires_grad_(False)
    for off in (torch._dynamo.config.patch(disable=True), torch.compiler.set_stance("force_eager")):
        with off, torch.no_grad():
            with pytest.warns(UserWarning, match="leaves the model plain: torch.compile is switched off"):
                optimize(model)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert torch.equal(model(prompt(1, 5)).logits, plain(prompt(1, 5)).logits)
            assert set(report(model).calls) == {UNCOMPILED}
            with pytest.raises(ValueError, match="switch it on, or use model.generate"):
                Engine(model, EngineConfig(**SMALL))
        restore(model)
