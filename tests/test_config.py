"""OptimizeConfig and uuid: every bad value is one line with rule, value and remedy; every change is a new key."""

import re
from functools import cache
from typing import Any

import pytest

from gemma4_compile import OptimizeConfig, inductor_options
from gemma4_compile import backend as backend_module
from gemma4_compile.backend import uuid
from gemma4_compile.passes import SWITCHES, Fusion
from gemma4_compile.patterns.fusion import every_layer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disable": ("rout",)}, "disable must name fusions, got 'rout'; did you mean 'route'?"),
        ({"enable": ("xyzzy",)}, "enable must name fusions, got 'xyzzy'; known are geglu"),
        ({"disable": "route"}, "disable must be a sequence of fusion names, got the string 'route'; write ('route',)"),
        ({"disable": ("route",), "enable": ("route",)}, "got both for route"),
        ({"device": "tpu"}, 'device must be "cpu", "cuda" or None, got \'tpu\''),
        ({"fusions": (Fusion("route", "", every_layer),)}, "must have a name of its own, got 'route'; choose another"),
        ({"max_graphs": 1}, "max_graphs must be an integer of at least 2"),
        ({"max_graphs": "8"}, "max_graphs must be an integer"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        OptimizeConfig(**options)
    assert "\n" not in str(caught.value)


def test_unknown_options_are_errors() -> None:
    with pytest.raises(TypeError, match="disabled"):
        OptimizeConfig(disabled=("route",))  # type: ignore[call-arg]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA4_COMPILE_DISABLE", "route,ple_tail")
    assert OptimizeConfig().enabled() == OptimizeConfig(disable=("route", "ple_tail")).enabled()
    monkeypatch.setenv("GEMMA4_COMPILE_DISABLE", "ple_tial")
    with pytest.raises(ValueError, match="GEMMA4_COMPILE_DISABLE must name fusions, got 'ple_tial'; did you mean 'ple_tail'"):
        OptimizeConfig().enabled()


def test_everything_can_be_enabled() -> None:
    assert OptimizeConfig(enable=tuple(SWITCHES)).enabled() == set(SWITCHES)


def test_uuid_follows_config_sources_and_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    config = OptimizeConfig()
    keys = {
        uuid(config, config.enabled()),
        uuid(config, config.enabled() - {"route"}),
        uuid(OptimizeConfig(cuda_graphs=True), config.enabled()),
        uuid(OptimizeConfig(inductor={"max_autotune": True}), config.enabled()),
    }
    assert len(keys) == 4
    assert uuid(OptimizeConfig(), config.enabled()) in keys

    (tmp_path / "pattern.py").write_text("a")
    monkeypatch.setattr(backend_module, "_SOURCES", (tmp_path,))
    for change in (lambda: None, lambda: (tmp_path / "pattern.py").write_text("b"), lambda: None):
        change()
        backend_module._source_digest.cache_clear()
        keys.add(uuid(config, config.enabled()))
    assert len(keys) == 6  # as it was, and with the other content
    monkeypatch.setattr(backend_module.torch, "__version__", "9")
    backend_module._source_digest.cache_clear()
    keys.add(uuid(config, config.enabled()))
    assert len(keys) == 7
    monkeypatch.undo()
    backend_module._source_digest.cache_clear()


def test_uuid_follows_fusions_of_ones_own() -> None:
    """By the file that they are written in; without one, no cache is ever to know them."""
    written = Fusion("own", "", every_layer, rewrites=cache(lambda: ()))
    typed = Fusion("own", "", every_layer, rewrites=eval("lambda: ()"))
    known, unknown = ([uuid(OptimizeConfig(fusions=(f,)), frozenset()) for _ in range(2)] for f in (written, typed))
    assert known[0] == known[1] != uuid(OptimizeConfig(), frozenset()) and len({*known, *unknown}) == 3


def test_inductor_options_carry_the_pass() -> None:
    options = inductor_options(OptimizeConfig(disable=("route",), inductor={"max_autotune": True}, cuda_graphs=True))
    assert options["max_autotune"] and options["triton.cudagraphs"]
    assert options["pre_grad_custom_pass"].uuid() != inductor_options()["pre_grad_custom_pass"].uuid()
