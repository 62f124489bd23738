"""A model that changes after it was compiled: engines, calls and saved programs follow, or say that they cannot."""

from __future__ import annotations

import copy
import json
import multiprocessing
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CompileConfig, GenerationConfig

from gemma4_compile import Engine, EngineConfig, SamplingParams, optimize, restore
from gemma4_compile.hf.watch import Watch
from gemma4_compile.packed.program import fingerprint, weights_of
from tests.models import prompt, tiny
from tests.passes.harness import passes_only

SMALL: dict[str, Any] = {
    "max_model_len": 64, "max_requests": 4, "max_batched_tokens": 32, "page_size": 16, "kv_bytes": 4 << 20, "overlap": False,
}  # fmt: skip
PROMPT = prompt(1, 20)[0].tolist() * 2  # two full pages


class Scaled(nn.Linear):
    """As adapters' layers: numbers and switches in attributes."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.scaling, self.disabled = {"default": 3.0}, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.disabled else y * self.scaling["default"]


def twice(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def write(model: Any) -> None:
    for name, weight in model.named_parameters():
        if "mlp" in name or "self_attn" in name:
            weight.mul_(-0.7)


def assign(model: Any) -> None:
    state = {key: value * (-0.7 if "mlp" in key else 1) for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()


def move(model: Any) -> None:
    for weight in model.model.layers[0].parameters():
        weight.data = weight.data * -0.7


def adapt(model: Any) -> None:
    layer = model.model.layers[0].mlp
    layer.gate_proj = Scaled(layer.gate_proj)


def set_eps(model: Any) -> None:
    model.model.norm.eps = 30.0


def set_config(model: Any) -> None:
    model.config.final_logit_softcapping = 0.5


def set_scaling(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.1


def hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(twice)


def patch(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = types.MethodType(lambda self, x: self.down_proj(self.up_proj(x)), mlp)


def replace_head(model: Any) -> None:
    torch.manual_seed(1)
    model.lm_head = nn.Linear(64, 128, bias=False).requires_grad_(False)


CHANGES: dict[str, Callable[[Any], None]] = {
    "written in place": write, "assigned": assign, "moved": move, "an adapter": adapt, "an attribute": set_eps,
    "config": set_config, "scaling of attention": set_scaling, "a hook": hook, "a patched forward": patch,
    "another head": replace_head,
}  # fmt: skip


def pair() -> tuple[Any, Any]:
    return tiny("dense").requires_grad_(False), passes_only(tiny("dense").requires_grad_(False))


def first_token(engine: Engine) -> Any:
    (output,) = engine.generate(PROMPT, SamplingParams(max_tokens=1, logprobs=0))
    assert output.logprobs
    return output.logprobs[0]


def assert_follows(engine: Engine, plain: Any) -> None:
    """Twice: the second time its prefix comes from pages."""
    for _ in range(2):
        found = first_token(engine)
        wanted = plain(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
        assert found.logprob == pytest.approx(wanted[found.token_id].item(), abs=1e-4)
        assert found.token_id == int(wanted.argmax())


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:gemma4_compile runs this call")
@torch.no_grad()
def test_engine_and_calls_follow(change: str) -> None:
    plain, model = pair()
    engine = Engine(model, EngineConfig(**SMALL))
    assert_follows(engine, plain)
    before, ids = first_token(engine), prompt(2, 9)
    logits = model(ids).logits
    for each in (plain, model):
        CHANGES[change](each)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=2e-5, atol=2e-5)
    assert_follows(engine, plain)
    assert first_token(engine).logprob != pytest.approx(before.logprob, abs=1e-3), "a change that changes nothing shows nothing"
    assert not torch.allclose(model(ids).logits, logits, atol=1e-2)


@pytest.mark.slow
@torch.no_grad()
def test_engine_follows_an_adapters_switches() -> None:
    plain, model = pair()
    for each in (plain, model):
        adapt(each)
    engine = Engine(model, EngineConfig(**SMALL))
    for name, value in (("scaling", {"default": 0.5}), ("disabled", True)):
        for each in (plain, model):
            setattr(each.model.layers[0].mlp.gate_proj, name, value)
        assert_follows(engine, plain)
    for each in (plain, model):
        each.model.layers[0].mlp.gate_proj.disabled = False
        each.model.layers[0].mlp.gate_proj.scaling["default"] = -2.0  # in the same dictionary
    assert_follows(engine, plain)


@torch.no_grad()
def test_engine_says_what_it_cannot_follow() -> None:
    """What cannot be followed is said, and undoing it is enough."""
    plain, model = pair()
    engine = Engine(model, EngineConfig(**SMALL))
    model.half()
    with pytest.warns(UserWarning, match="must stay torch.float32 on cpu, got torch.float16"):
        (output,) = engine.generate(PROMPT)
    assert output.finish_reason == "error" and "make a new engine" in output.error
    with pytest.raises(ValueError, match="make a new engine"):
        engine.refresh()
    for mine, right in zip(weights_of(model).values(), weights_of(plain).values(), strict=True):
        mine.data = right.data.clone()
    assert_follows(engine, plain)


@torch.no_grad()
def test_other_layers_are_refused() -> None:
    _, model = pair()
    engine = Engine(model, EngineConfig(**SMALL))
    model.resize_token_embeddings(140)
    with pytest.raises(ValueError, match="must keep its layers and its vocabulary"):
        engine.add_request(PROMPT)
    assert not engine.has_work


@torch.no_grad()
def test_refresh_is_for_what_cannot_be_seen() -> None:
    plain, model = pair()
    engine = Engine(model, EngineConfig(**SMALL))
    assert_follows(engine, plain)
    for each in (plain, model):
        for weight in each.model.layers[0].parameters():
            weight.data.mul_(-0.7)  # PyTorch does not count it
    engine.refresh()
    assert_follows(engine, plain)
    engine.add_request(PROMPT)
    with pytest.raises(RuntimeError, match="got 1 that run; abort them"):
        engine.refresh()


@torch.no_grad()
def test_nothing_is_done_anew_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """generate(), calls for hidden states and engines' own runs leave nothing behind that looks like one."""
    _, model = pair()
    engine = Engine(model, EngineConfig(**SMALL))
    model.generate(prompt(1, 5), max_new_tokens=3)
    model(prompt(1, 5), output_hidden_states=True)
    for _ in range(2):  # transformers leaves hooks behind a call for hidden states
        model.generate(prompt(1, 5), max_new_tokens=3)
        engine.generate(PROMPT)
    monkeypatch.setattr(engine, "refresh", lambda: pytest.fail("the engine was refreshed"))
    monkeypatch.setattr(Watch, "__init__", lambda *_: pytest.fail("looked at anew"))
    for _ in range(2):
        model.generate(prompt(1, 5), max_new_tokens=3)
        engine.generate(PROMPT)
    pool = engine.runner.pages.pools["full_attention"]
    assert engine.generate(PROMPT)[0].metrics.cached_tokens > 0 and pool.free == pool.pages


def test_a_saved_programs_name_has_what_it_depends_on() -> None:
    """And a model that no text tells from others has no name."""
    names = [fingerprint(tiny("dense")), fingerprint(tiny("dense"))]
    assert names[0] == names[1] != ""
    for change in (set_eps, set_config, set_scaling):
        model = tiny("dense")
        change(model)
        names.append(fingerprint(model))
    assert len(set(names)) == 4
    for change in (hook, patch, adapt):  # of the test's own class, which has no version
        model = tiny("dense")
        change(model)
        assert not fingerprint(model)


def test_an_adapter_of_a_library_is_named_with_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("some_adapters")
    vars(library)["__version__"] = "1.0"
    monkeypatch.setitem(__import__("sys").modules, "some_adapters", library)
    monkeypatch.setattr(Scaled, "__module__", "some_adapters.layers")
    names = []
    for value in (3.0, 8.0, 8.0, object()):
        model = tiny("dense")
        adapt(model)
        model.model.layers[0].mlp.gate_proj.scaling["default"] = value  # type: ignore[union-attr, index, operator]
        names.append(fingerprint(model))
    vars(library)["__version__"] = "1.1"
    assert names[0] != names[1] == names[2] and names[0] and not names[3] and fingerprint(model) == ""


def _compiling() -> GenerationConfig:
    """Which has transformers compile calls with static caches, on a CPU too."""
    compiled = CompileConfig()
    compiled._compile_all_devices = True  # type: ignore[assignment]
    return GenerationConfig(max_new_tokens=3, cache_implementation="static", compile_config=compiled, pad_token_id=0)


@pytest.mark.parametrize("how", ["passed", "set", "saved"])
def test_generate_compiles_no_optimized_model(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever generation_config it is told; a copy is compiled as before, and saved files say nothing of it."""
    _, model = pair()
    asked: list[Any] = []

    def compiled_call(self: Any, config: Any) -> Any:
        asked.append(self)
        return self.__call__

    monkeypatch.setattr(type(model), "get_compiled_call", compiled_call)
    options: dict[str, Any] = {"generation_config": _compiling()} if how == "passed" else {}
    if how == "set":
        model.generation_config = _compiling()
    if how == "saved":
        model.save_pretrained(tmp_path / "optimized")
        restore(model)
        model.save_pretrained(tmp_path / "restored")
        saved = [json.loads((tmp_path / kind / "generation_config.json").read_text()) for kind in ("optimized", "restored")]
        assert saved[0] == saved[1] and "disable_compile" not in saved[0]
        return
    model.generate(prompt(1, 5), **options)
    assert not asked
    other = copy.deepcopy(model)
    other.generate(prompt(1, 5), **options)
    assert asked and set(map(id, asked)) == {id(other)}
    restore(model)
    model.generate(prompt(1, 5), **options)
    assert asked[-1] is model


def _generate_elsewhere(model: Any, results: Any) -> None:
    """In another process."""
    results.put(model.generate(prompt(1, 5), max_new_tokens=6, do_sample=False).tolist())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_an_optimized_model_in_another_process(how: str) -> None:
    """Forked, with what is compiled; spawned, it is pickled and compiles for itself. Both, and the parent, go on as before."""
    plain: Any = tiny("e").requires_grad_(False)
    model: Any = optimize(tiny("e").requires_grad_(False))
    wanted = plain.generate(prompt(1, 5), max_new_tokens=6, do_sample=False).tolist()
    assert model.generate(prompt(1, 5), max_new_tokens=6, do_sample=False).tolist() == wanted
    context: Any = multiprocessing.get_context(how)
    results = context.Queue()
    process = context.Process(target=_generate_elsewhere, args=(model, results))
    process.start()
    try:
        assert results.get(timeout=240) == wanted
    finally:
        process.join(30)
        process.kill()
    assert model.generate(prompt(1, 5), max_new_tokens=6, do_sample=False).tolist() == wanted
