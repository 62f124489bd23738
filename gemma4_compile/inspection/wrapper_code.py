"""Reads the Python module that Inductor writes: which kernels it defines, and which calls it makes in which order."""

import ast
import re
from dataclasses import dataclass

_HANDLE = re.compile(r"# \[Provenance debug handles\] (?P<name>\S+):(?P<handle>\d+)")
# Calls into libraries and registered ops. Everything else in the module allocates, views or checks.
_LIBRARY_CALLS = ("extern_kernels.", "torch.ops.", "aten.")


@dataclass(frozen=True)
class Call:
    """One kernel call.

    name       the kernel as the code names it, without `.run`
    key        name:handle, as the provenance tables have it; empty if the code has no handle for it
    text       the statement
    arguments  the buffer or graph input at each place, None where there is neither
    reads      buffers that a generated kernel reads, and those it updates in place; of a library call, all its arguments
    writes     buffers that it fills or updates
    """

    name: str
    key: str
    text: str
    arguments: tuple[str | None, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass(frozen=True)
class WrapperCode:
    """kernels: name -> source of those that Inductor generated; calls: in order."""

    kernels: dict[str, str]
    calls: tuple[Call, ...]


def read(code: str) -> WrapperCode:
    """Parse an output code module. Raises ValueError for text that has no `call`, which is no such module."""
    tree = ast.parse(code)
    kernels = {
        target.id: _kernel_source(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and _dotted(getattr(node.value, "func", None)).startswith("async_compile.")
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    if "call" not in functions:
        raise ValueError("Inductor's code must define `call`, got a module without; leave cpp_wrapper out of the options")
    lines = code.splitlines()
    calls: list[Call] = []
    _collect(functions["call"], functions, kernels, lines, calls)
    return WrapperCode(kernels, tuple(calls))


def _collect(
    function: ast.FunctionDef,
    functions: dict[str, ast.FunctionDef],
    kernels: dict[str, str],
    lines: list[str],
    calls: list[Call],
) -> None:
    handles = {}
    for number in range(function.lineno, (function.end_lineno or function.lineno) + 1):
        if found := _HANDLE.search(lines[number - 1]):
            handles[number] = found
    for node in sorted((n for n in ast.walk(function) if isinstance(n, ast.Call)), key=lambda n: (n.lineno, n.col_offset)):
        name = _dotted(node.func)
        if name.startswith("partition_") and name in functions:  # where Inductor cut the graph for CUDA graphs
            _collect(functions[name], functions, kernels, lines, calls)
            continue
        base = name.removesuffix(".run")
        if base not in kernels and not name.startswith(_LIBRARY_CALLS):
            continue
        above = max((line for line in handles if line <= node.lineno), default=None)
        found = handles.pop(above) if above is not None and handles[above]["name"] == base else None
        key = f"{base}:{found['handle']}" if found else ""
        text = " ".join(line.strip() for line in lines[node.lineno - 1 : node.end_lineno])
        arguments = tuple(_buffer(argument) for argument in node.args)
        calls.append(Call(base, key, text, arguments, *_reads_and_writes(base, arguments, text, kernels)))


_BUFFER = re.compile(r"(buf|arg|primals_)\d+(_\d+)?")
_PARAMETERS = re.compile(r"(?:def|void)\s+\w+\((?P<names>[^)]*_ptr[^)]*)\)")
_POINTER = re.compile(r"\b(in_out|in|out)_ptr\d+")
_RESULT = re.compile(r"(?:^|\bout=)(?P<buffer>buf\d+)\b(?: = |\))")


def _buffer(argument: ast.expr) -> str | None:
    """The buffer or graph input that an argument is, or is a view of."""
    names = [n.id for n in ast.walk(argument) if isinstance(n, ast.Name) and _BUFFER.fullmatch(n.id)]
    return names[0] if names else None


def _reads_and_writes(
    name: str, arguments: tuple[str | None, ...], text: str, kernels: dict[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if name not in kernels:
        results = tuple(found["buffer"] for found in _RESULT.finditer(text))
        return tuple(argument for argument in arguments if argument), results
    parameters = _PARAMETERS.search(kernels[name])
    ways = [found.group(1) for found in map(_POINTER.search, parameters["names"].split(",")) if found] if parameters else []
    pointers = list(zip(arguments, ways, strict=False))  # pointers come first, sizes after them
    return (
        tuple(buffer for buffer, way in pointers if buffer and way != "out"),
        tuple(buffer for buffer, way in pointers if buffer and way != "in"),
    )


def op_of(name: str) -> str:
    """mm of extern_kernels.mm and of torch.ops.aten.mm.default."""
    parts = name.split(".")
    return parts[3] if name.startswith("torch.ops.") and len(parts) > 3 else parts[-1]


def _kernel_source(call: ast.expr) -> str:
    """The longest string among the arguments: the source, whatever else a version of Inductor passes."""
    strings = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return max(strings, key=len, default="").strip("\n")


def _dotted(node: ast.expr | None) -> str:
    """a.b.c of an attribute chain; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""
