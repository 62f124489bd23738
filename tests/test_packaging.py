"""What is installed is what is here."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import gemma4_compile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import pip._vendor.tomli as tomllib

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {m.name for m in pkgutil.walk_packages(gemma4_compile.__path__, "gemma4_compile.") if m.ispkg}
    assert set(project["tool"]["setuptools"]["packages"]) == found | {"gemma4_compile"}
    assert project["project"]["version"] == gemma4_compile.__version__


def test_python_m_runs_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "gemma4_compile", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == gemma4_compile.__version__


def test_links_of_the_source_folders() -> None:
    for name in ("passes", "patterns"):
        assert (ROOT / "gemma4_compile" / name).resolve() == ROOT / name


def test_help_waits_for_no_library() -> None:
    """Names of the package are imported when they are asked for: torch alone takes two seconds."""
    code = "import sys; from gemma4_compile.cli import main\ntry: main(['--help'])\nfinally: print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "an engine continues prompts" in done.stdout
    assert not {"'torch'", "'transformers'", "'numpy'"} & set(done.stdout.splitlines()[-1].strip("[]").split(", "))


def test_every_name_is_where_it_is_said_to_be() -> None:
    assert all(hasattr(gemma4_compile, name) for name in gemma4_compile.__all__)
    assert set(gemma4_compile.__all__) == set(gemma4_compile._HOMES) <= set(dir(gemma4_compile))
