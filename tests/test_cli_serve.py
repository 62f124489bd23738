"""gemma4-compile generate and chat, in process: text on stdout, the rest on stderr, exit codes."""

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma4_compile import Engine
from gemma4_compile.cli import main
from gemma4_compile.cli import serve as cli_serve
from gemma4_compile.cli.common import DEMO_PROMPT
from gemma4_compile.torchrun import RanksError

SHORT = ["--device", "cpu", "--max-tokens", "12"]
_LOADED: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of all tests are of one model in float32, which is loaded and compiled by the first."""
    real = cli_serve.load_model

    def load_model(options: Any, text_only: bool = False) -> Any:
        if options.model not in _LOADED:
            options.dtype = "float32"
            _LOADED[options.model] = real(options, text_only)
        return _LOADED[options.model]

    monkeypatch.setattr(cli_serve, "load_model", load_model)


@pytest.fixture
def text(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """stdout of `generate` with these arguments, which succeeds."""

    def run(*arguments: str) -> str:
        assert main(["generate", *arguments, *SHORT]) == 0
        return capsys.readouterr().out

    return run


def test_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--demo", *SHORT]) == 0
    out = capsys.readouterr()
    assert "self" in out.out and out.out.endswith("\n")
    assert out.err.splitlines()[-1].startswith("12 tokens in ") and "on cpu; TTFT " in out.err and ", TPOT " in out.err


def test_the_demo_with_its_assistant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--demo", *SHORT]) == 0
    plain = capsys.readouterr().out
    assert main(["generate", "--demo", "--mtp", "--speculative-tokens", "1:2,8:0", *SHORT]) == 0
    out = capsys.readouterr()
    assert out.out == plain and " drafts accepted (" in out.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["some/model", "text", "--mtp"], "--mtp knows the assistants of the demo checkpoints, got some/model; give"),
        (["--demo", "--mtp", "--speculative-tokens", "0"], "speculative tokens must be 1 or more, got 0; leave"),
        (["--demo", "--mtp", "--speculative-tokens", "1:4,x"], "or 'adaptive', got '1:4,x'; leave"),
    ],
)
def test_assistants_that_cannot_be(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_several_prompts_come_in_their_order(text: Callable[..., str]) -> None:
    prompts = ["def add(a, b):\n    return", "import os\n", "class Stack:\n"]
    alone = [text("e", prompt) for prompt in prompts]
    assert len(set(alone)) == 3
    assert text("e", *prompts) == "\n".join(alone)
    assert text("--demo", *prompts) == "\n".join(alone)


def test_prompts_of_files_and_stdin(text: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "def add(a, b):\n    return"
    (tmp_path / "prompt").write_text(prompt)
    wanted = text("e", prompt)
    assert text("e", "-f", str(tmp_path / "prompt")) == wanted
    monkeypatch.setattr(sys, "stdin", io.StringIO(prompt))
    assert text("e", "import os\n", "-f", "-") == text("e", "import os\n") + "\n" + wanted


def test_json(text: Callable[..., str]) -> None:
    prompt = "def add(a, b):\n    return"
    plain = text("e", prompt)
    first, second = json.loads(text("e", prompt, DEMO_PROMPT, "--json"))
    assert first["text"] + "\n" == plain and len(second["token_ids"]) == 12
    assert (first["finish_reason"], first["error"]) == ("length", "")
    metrics = first["metrics"]
    assert metrics["output_tokens"] == 12 and metrics["prompt_tokens"] == len(first["prompt_token_ids"])
    assert metrics["ttft"] > metrics["queue_time"] >= 0 and metrics["tpot"] > 0


def test_sampling_options(text: Callable[..., str]) -> None:
    greedy = text("--demo")
    stop = greedy.strip()[4:7]
    assert text("--demo", "--stop", "never", "--stop", stop) == greedy[: greedy.index(stop)] + "\n"
    hot = [text("--demo", "--temperature", "1.5", "--seed", seed) for seed in ("1", "1", "2")]
    assert hot[0] == hot[1] != hot[2]
    assert text("--demo", "--temperature", "1.5", "--top-k", "1") == greedy
    assert text("--demo", "--temperature", "1.5", "--top-p", "0.0001") == greedy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "generate needs a model"),
        (["generate", "e"], "generate needs a prompt"),
        (["generate", "no/such", "x"], "no/such"),
        (["generate", "./no-such", "x"], "no such folder"),
        (["generate", "e", "-f", "no-such-file"], "no-such-file"),
        (["generate", "--demo", "--max-tokens", "0"], "max_tokens must be 1 or more, got 0"),
        (["generate", "--demo", "--temperature", "-1"], "temperature must be 0.0 to 1000000.0, got -1.0"),
        (["generate", "--demo", "--top-k", "-1"], "top_k must be 0 to 2147483647, got -1"),
        (["generate", "--demo", "--top-p", "1.5"], "top_p must be 0.0 to 1.0, got 1.5"),
        (["generate", "--demo", "--seed", "-1"], "seed must be 0 to"),
        (["generate", "--demo", "--stop", ""], "stop must hold strings that are not empty"),
        (["generate", "--demo", "--max-model-len", "0"], "max_model_len must be a positive integer, got 0"),
        (["generate", "--demo", "--disable", "rout"], "did you mean 'route'"),
        (["chat", "no/such"], "no/such"),
        (["chat", "--max-tokens", "0"], "max_tokens must be 1 or more, got 0"),
        (["chat", "--json"], "chat prints text as it comes"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main([*arguments, "--device", "cpu"]) == 1
    out = capsys.readouterr()
    assert out.err.startswith("gemma4-compile: ") and message in out.err and out.err.count("\n") == 1 and not out.out


@pytest.mark.parametrize(
    ("length", "message"),
    [("4096", "max_model_len must be at most the model's context, 2048, got 4096"), ("16", "a prompt must leave room")],
)
def test_errors_that_need_the_model(length: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--demo", "--max-model-len", length, *SHORT]) == 1
    out = capsys.readouterr()
    last = out.err.splitlines()[-1]  # before it, how long the compiled pieces took to load
    assert last.startswith("gemma4-compile: ") and message in last and "Traceback" not in out.err and not out.out


def test_wrong_values_do_not_cost_the_time_of_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_serve, "load_model", lambda *_, **__: pytest.fail("loaded"))
    for wrong in (["--max-tokens", "0"], ["--max-model-len", "0"]):
        assert main(["generate", "--demo", *wrong]) == main(["chat", *wrong]) == 1


def test_usage_is_exit_code_2() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--demo", "--kv-dtype", "int4"])
    assert caught.value.code == 2


def test_only_the_first_rank_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    for more in ([], ["--json"]):
        assert main(["generate", "--demo", *more, *SHORT]) == 0
        assert capsys.readouterr().out == ""


def test_a_request_that_fails_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Engine):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            self.runner.launch = lambda *_: 1 / 0  # type: ignore

    monkeypatch.setattr("gemma4_compile.Engine", Broken)
    assert main(["generate", "--demo", *SHORT]) == 1
    err = capsys.readouterr().err
    assert "gemma4-compile: a step failed: ZeroDivisionError" in err and "Traceback" not in err


def chat(said: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    return main(["chat", *SHORT, *more])


def test_chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: Callable[..., str]) -> None:
    first = text("e", "def add(a, b):")
    second = text("e", f"def add(a, b):{first}x = 1")
    again = text("e", "x = 1")
    assert again != second
    assert chat("def add(a, b):\nx = 1\n/reset\nx = 1\n\nnever read\n", monkeypatch) == 0
    out = capsys.readouterr()
    assert out.out == first + second + again
    assert out.err.count("continues the text") == 1


def test_chat_goes_on_after_a_line_that_is_too_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: Callable[..., str]
) -> None:
    wanted = text("e", "x = 1")
    assert chat(f"{'x = 1 ' * 100}\nx = 1\n", monkeypatch, "--max-model-len", "64") == 0
    out = capsys.readouterr()
    assert out.out == wanted and "a prompt must leave room" in out.err and "/reset begins anew" in out.err


@pytest.mark.parametrize("arguments", [["report", "e"], ["demo"], ["inspect", "e", "--out", "x"]])
def test_other_commands_run_on_one_rank(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments) == 1
    assert f"{arguments[0]} runs on one rank, got 2; start it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["generate", "--demo", "-f", "-"], ["chat"]])
def test_another_rank_follows_and_neither_reads_nor_prints(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    followed: list[str] = []

    class Follower:
        def run_worker(self) -> None:
            followed.append("followed")

    monkeypatch.setattr(cli_serve, "_engine", lambda options: Follower())
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setenv("RANK", "1")
    assert main(arguments) == 0
    assert followed == ["followed"] and capsys.readouterr().out == ""


def test_a_rank_that_is_gone_is_an_error_and_an_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the interpreter's own end, which would wait for a GPU that waits for the other rank."""

    def gone(options: Any) -> Any:
        raise RanksError("rank 0 of 2 cannot go on: rank 1 is gone")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(cli_serve, "_engine", gone)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="1"):
        main(["generate", "--demo"])
    assert capsys.readouterr().err == "gemma4-compile: rank 0 of 2 cannot go on: rank 1 is gone\n"
