"""The documentation says what is: its tables, its API page, the files, links and names in it."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import gemma4_compile
from gemma4_compile.passes import SWITCHES, pipeline
from scripts import api_page, tables

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*tables.documents(), ROOT / "CONTRIBUTING.md"]
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


@every_document
def test_tables_are_the_records(path: Path) -> None:
    assert tables.written(path.read_text()) == path.read_text(), "run scripts/tables.py"


def test_each_table_is_somewhere_once() -> None:
    found = [block["name"] for path in tables.documents() for block in tables.BLOCK.finditer(path.read_text())]
    assert sorted(found) == sorted(tables.TABLES)


def test_a_changed_table_is_found() -> None:
    text = (ROOT / "docs" / "transforms.md").read_text()
    (row,) = re.findall(r"\| E2B, 30 x 7000 .*", text)
    assert tables.written(text.replace(row, row.replace("2.25", "2.26"))) == text


def test_api_page_is_the_docstrings() -> None:
    assert api_page.PAGE.read_text() == api_page.page(), "run scripts/api_page.py"


def test_one_drawing_of_the_pipeline_and_it_is_right() -> None:
    drawings = [line for path in DOCUMENTS for line in path.read_text().splitlines() if "─ Dynamo ─▶" in line]
    assert len(drawings) == 1
    passes = [step.name for step in pipeline(SWITCHES)]
    drawn = [step.strip() for step in drawings[0].split("─▶")[1:]]
    assert set(drawn) - set(passes) == {"raise", "fuse"}  # several passes each
    assert [step for step in drawn if step in passes] == [name for name in passes if name in drawn]
    assert drawn.index("raise") + 1 == drawn.index("experts") and drawn.index("yoco") + 1 == drawn.index("fuse")


FOLDERS = ("gemma4_compile", "passes", "patterns", "scripts", "tests", "examples", "benchmarks")
# Files of which the documents speak and that are made when something runs, or stand for others.
NOT_HERE = {
    "catalogue.txt", "graphs/VARIANT/NN_PASS.py", "inductor/VARIANT.py", "inspection.json", "program.json", "trace.json",
    "trace_plain.json", "gemma4_compile/ops/fusions/x.py", "patterns/x.py", "tests/passes/test_x.py",
}  # fmt: skip


def _named_files(path: Path) -> set[str]:
    return set(re.findall(r"`([\w./-]+\.(?:py|json|txt))(?=[`:])", path.read_text()))


@every_document
def test_named_files_exist(path: Path) -> None:
    files = [f"/{file.relative_to(ROOT)}" for folder in FOLDERS for file in (ROOT / folder).rglob("*.*")]
    missing = {name for name in _named_files(path) if not any(file.endswith(f"/{name}") for file in files)}
    assert missing <= NOT_HERE


def test_named_files_are_found() -> None:
    named = _named_files(ROOT / "docs" / "engine.md")
    assert {"runtime/engine.py", "graphs/dispatch.py", "benchmarks/acceptance-cpu.json"} <= named


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@every_document
def test_links_lead_somewhere(path: Path) -> None:
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), flags=re.MULTILINE)
            assert anchor in {_anchor(heading) for heading in headings}, target


def _calls(tree: ast.AST) -> list[tuple[Any, list[str]]]:
    """What gemma4_compile exports and a piece of code calls, with the keywords of the call."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in gemma4_compile.__all__:
                found.append((getattr(gemma4_compile, name), [keyword.arg for keyword in node.keywords if keyword.arg]))
    return found


@every_document
def test_python_in_it_names_what_exists(path: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL):
        if path == api_page.PAGE or code.startswith("    "):  # signatures; a part of an example
            continue
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gemma4_compile"):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        for thing, keywords in _calls(tree):
            assert set(keywords) <= set(inspect.signature(thing).parameters), (thing, keywords)
