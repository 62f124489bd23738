"""The command line, in process: results on stdout, errors in one line on stderr, exit codes."""

import json

import pytest

from gemma4_compile.cli import main


def test_demo_prints_text_and_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--device", "cpu", "--max-tokens", "12", "--prompt", "def add(a, b):\n    return"]) == 0
    out = capsys.readouterr()
    assert "def add(a, b):" in out.out and "graphs compiled, no graph breaks" in out.out
    assert "compiling piece 1 of" in out.err or "loading compiled pieces" in out.err


@pytest.mark.slow
def test_report_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "moe", "--device", "cpu", "--json", "--disable", "route"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fusions"]["route"]["enabled"] is False
    assert result["fusions"]["feed_forward_tail"]["matched"] == 6 and result["graphs_compiled"] + result["loaded"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "no/such"], "no such folder"),
        (["demo", "--disable", "rout"], "did you mean 'route'"),
        (["demo", "--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        (["demo", "--temperature", "-1"], "--temperature must be 0"),
        (["report", "e", "--layers", "2"], "--layers cuts a bare config"),
        (["report", "E2B", "--layers", "2"], "layers must be 4 to 35"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("gemma4-compile: ") and message in err and err.count("\n") == 1


def test_usage_is_exit_code_2() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["no-such-command"])
    assert caught.value.code == 2
