"""docs/api.md, written from the docstrings of what gemma4_compile exports.

    python scripts/api_page.py            rewrite docs/api.md
    python scripts/api_page.py --check    write nothing; exit 1 if it differs

Signatures are read from the source, so that the page is the same with each version of Python and of the libraries.
"""

import argparse
import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gemma4_compile  # noqa: E402

PAGE = ROOT / "docs" / "api.md"
GROUPS = {
    "Optimize a model": ("optimize", "restore", "report", "Report", "inductor_options", "OptimizeConfig"),
    "Serve it": (
        "Engine", "AsyncEngine", "EngineConfig", "SamplingParams", "SpeculativeConfig", "RequestOutput", "Chunk",
    ),
    "Look into a step": ("inspect", "Inspection"),
    "Demo checkpoints": ("demo_checkpoint",),
}  # fmt: skip


def page() -> str:
    """The whole page. Raises ValueError for a name that is exported and in no group, or the other way round."""
    if different := {name for names in GROUPS.values() for name in names} ^ set(gemma4_compile.__all__):
        raise ValueError(f"GROUPS must have each exported name once, got {sorted(different)} in one only; edit them")
    written = "This page is written by `scripts/api_page.py` from the docstrings."
    lines = ["# API", f"All names are imported from `gemma4_compile`. {written}", ""]
    for title, names in GROUPS.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += _entry(name, getattr(gemma4_compile, name))
    return "\n".join(lines).rstrip() + "\n"


def _entry(name: str, thing: Any) -> Iterator[str]:
    yield f"### `{name}`"
    yield from _fenced(_signature(_definition(thing)), "python")
    yield from _fenced(_documentation(thing), "text")
    yield ""
    if not isinstance(thing, type):
        return
    for member in (node for node in _definition(thing).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
        if member.name.startswith("_") or not (text := ast.get_docstring(member)):
            continue
        is_property = any(isinstance(each, ast.Name) and each.id == "property" for each in member.decorator_list)
        signature = f"{name}.{member.name}{_returned(member)}" if is_property else _signature(member, f"{name}.")
        yield from _fenced(signature, "python")
        yield from _fenced(text, "text")
        yield ""


def _fenced(text: str, language: str) -> Iterator[str]:
    yield from (f"```{language}", text, "```")


def _documentation(thing: Any) -> str:
    text = inspect.getdoc(thing)
    if not text:
        raise ValueError(f"what is exported must have a docstring, got none of {thing.__name__}; write one")
    return text


def _definition(thing: Any) -> Any:
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    return found


def _returned(node: Any) -> str:
    return f" -> {ast.unparse(node.returns)}" if node.returns else ""


def _signature(node: Any, prefix: str = "") -> str:
    """Of a function, or of a class as it is made: by __init__, or by the fields of a dataclass, one a line."""
    if not isinstance(node, ast.ClassDef):
        start = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
        if node.args.args and node.args.args[0].arg == "self":
            node.args.args.pop(0)
        return f"{start}{prefix}{node.name}({ast.unparse(node.args)}){_returned(node)}"
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            member.name, member.returns = node.name, None
            return _signature(member)
    fields = [ast.unparse(member) for member in node.body if isinstance(member, ast.AnnAssign)]
    return "\n".join([f"class {node.name}:", *(f"    {field}" for field in fields)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    new = page()
    stale = not PAGE.exists() or PAGE.read_text() != new
    if stale and not check:
        PAGE.write_text(new)
    state = "up to date" if not stale else "stale, run scripts/api_page.py" if check else "written"
    print(f"{PAGE.relative_to(ROOT)}: {state}")
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
