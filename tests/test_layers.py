"""The floors of the package: no import runs from a lower one to a higher one, and no files import each other in a ring."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# From the ground up. A name is a file or a folder; what stands on one line stands on one floor.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("borrowed", "dynamo", "garbage", "geometry", "progress", "torchrun"),
    ("ops.library",),
    ("ops.dependent", "ops.examples", "ops.gluon", "ops.plans", "ops.rows"),
    ("ops.rms_norm", "ops.rope", "ops.attention", "ops.attention_hopper", "ops.block_attention"),
    ("ops.fusions", "ops.sampling"),
    ("ops.distributed",),
    ("ops",),
    ("patterns",),
    ("hf",),
    ("passes",),
    ("config",),
    ("backend", "inductor"),
    ("packed",),
    ("graphs",),
    ("calls", "vision"),
    ("optimized",),
    ("reporting", "demo"),
    ("inspection", "vllm"),
    (
        "runtime.scheduling",
        "runtime.sampling_params",
        "runtime.outputs",
        "runtime.metrics",
        "runtime.text",
        "runtime.vision",
        "runtime.constraint",
    ),
    ("runtime.step",),
    ("runtime.speculative",),
    ("runtime.worker",),
    ("runtime",),
    ("bench", "serve"),
    ("cli", "__main__"),
)


def _modules() -> dict[str, Path]:
    """Every module by its name below gemma4_compile; the package itself, which only names others, is left out."""
    found = {}
    for folder, prefix in (("gemma4_compile", ()), ("passes", ("passes",)), ("patterns", ("patterns",))):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if any(part.is_symlink() for part in path.parents):
                continue
            parts = (*prefix, *path.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if name}


def _imports(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    package = (name if path.name == "__init__.py" else name.rpartition(".")[0]).split(".")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join(["gemma4_compile", *above, *([node.module] if node.module else [])])
            targets = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        below = (target.removeprefix("gemma4_compile.") for target in targets if target.startswith("gemma4_compile."))
        names = {target for target in below if target in modules}
        found |= {n for n in names if not any(other.startswith(f"{n}.") for other in names)} - {name}
    return found


def _floor(name: str) -> int:
    """Of the longest name in FLOORS that holds this module."""
    places = {entry: place for place, entries in enumerate(FLOORS) for entry in entries}
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (entry := ".".join(parts[:length])) in places:
            return places[entry]
    raise AssertionError(f"{name} has no floor; give it one in FLOORS")


def test_no_import_runs_upwards() -> None:
    modules = _modules()
    wrong = [
        f"{name} imports {other}"
        for name, path in modules.items()
        for other in sorted(_imports(name, path, modules))
        if _floor(other) > _floor(name)
    ]
    assert not wrong


def test_no_ring_of_imports() -> None:
    """Take away, again and again, what imports nothing that is left: rings stay."""
    modules = _modules()
    left = {name: _imports(name, path, modules) for name, path in modules.items()}
    while True:
        free = {name for name, others in left.items() if not others & left.keys()}
        if not free:
            break
        left = {name: others for name, others in left.items() if name not in free}
    assert not left


def test_wrong_imports_are_found(tmp_path: Path) -> None:
    low, high = tmp_path / "low.py", tmp_path / "high.py"
    low.write_text("def late():\n    from gemma4_compile.runtime import engine\n")
    high.write_text("from . import pages\nfrom ..step.arrays import build\n")
    modules = dict.fromkeys(("runtime", "runtime.engine", "runtime.scheduling.pages", "runtime.step.arrays"), low)
    assert _imports("ops.library", low, modules) == {"runtime.engine"}
    assert _imports("runtime.scheduling.scheduler", high, modules) == {"runtime.scheduling.pages", "runtime.step.arrays"}
    assert _floor("ops.library") < _floor("runtime.engine")
