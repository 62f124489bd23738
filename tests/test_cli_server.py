"""gemma4-compile serve: its arguments, and what is wrong with them. How it serves is tested in tests/serve."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma4_compile.cli import _parser, main
from gemma4_compile.cli import server as cli_server
from gemma4_compile.cli.common import load_model
from gemma4_compile.serve import server
from gemma4_compile.serve.config import ServeConfig
from gemma4_compile.serve.templates import PLAIN
from tests.models import tiny


class Loaded:
    """Instead of an engine."""

    is_driver = True
    closed = followed = False

    def __enter__(self) -> "Loaded":
        return self

    def __exit__(self, *_: Any) -> None:
        self.closed = True

    def run_worker(self) -> None:
        self.followed = True


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is handed to the server, and the engine."""
    found: dict[str, Any] = {"engine": Loaded()}
    monkeypatch.setattr(cli_server, "_engine", lambda options: found["engine"])
    monkeypatch.setattr(
        server, "serve", lambda engine, config, on_ready: found.update(config=config, running=engine.is_running)
    )
    monkeypatch.setattr("gemma4_compile.AsyncEngine", Running)
    return found


class Running:
    def __init__(self, engine: Loaded):
        self.is_running = True

    def close(self) -> None:
        self.is_running = False


def test_the_demo_has_a_template_of_ours(served: dict[str, Any]) -> None:
    assert main(["serve", "--demo", "--port", "0", "--cors-origin", "https://a.example"]) == 0
    assert served["config"] == ServeConfig("e", port=0, chat_template=PLAIN, cors_origins=("https://a.example",))
    assert served["running"] and served["engine"].closed


def test_names_templates_and_keys(served: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cli_server.API_KEY_VARIABLE, "secret")
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    arguments = ["serve", "some/model", "--served-model-name", "gemma", "--chat-template", str(tmp_path / "chat.jinja")]
    assert main(arguments) == 0
    config = served["config"]
    assert (config.model, config.api_key, config.chat_template) == ("gemma", "secret", "{{ messages }}")
    assert (config.host, config.port) == ("127.0.0.1", 8000)


def test_another_rank_follows(served: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["serve", "--demo"]) == 0
    assert served["engine"].followed and "config" not in served


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "serve needs one model, got none"),
        (["e", "--demo"], "serve needs one model, got two"),
        (["--demo", "--port", "-1"], "port must be 0 to 65535, got -1"),
        (["--demo", "--max-waiting", "-1"], "max_waiting must be at least 0, got -1"),
        (["--demo", "--api-key", "é"], "api_key must be ASCII"),
        (["--demo", "--chat-template", "no-such-file"], "no-such-file"),
    ],
)
def test_errors_are_one_line_and_cost_no_loading(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_server, "_engine", lambda _: pytest.fail("loaded"))
    assert main(["serve", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("gemma4-compile: ") and message in error and error.count("\n") == 1


def test_without_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma4_compile.serve.config", None)
    assert main(["serve", "--demo"]) == 1
    assert "pip install 'gemma4-compile[serve]'" in capsys.readouterr().err


def test_random_weights(tmp_path: Path) -> None:
    """As the other commands take them, though this one cuts no layers."""
    config = tmp_path / "config.json"
    config.write_text(tiny("dense").config.to_json_string())
    options = _parser().parse_args(["serve", str(config), "--device", "cpu", "--dtype", "float16"])
    model, tokenizer = load_model(options, text_only=True)
    assert (model.dtype, tokenizer) == (torch.float16, None)
