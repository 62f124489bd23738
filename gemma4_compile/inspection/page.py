"""The page of an inspection: one HTML file with data, style and script in it, which asks the network for nothing."""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .data import Inspection, Kernel, Line, Value, Variant

_TITLES = {"plain": "plain Inductor"}


def render(inspection: Inspection) -> str:
    """The page as text, to be written as UTF-8."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters |= {
        "count": "{:,}".format,
        "time": time,
        "size": size,
        "change": change,
        "tone": tone,
    }
    names = dict.fromkeys(work.name for variant in inspection.variants for work in variant.outside)
    outside = {name: [_outside(variant, name) for variant in inspection.variants] for name in names}
    return environment.get_template("report.html.j2").render(
        inspection=inspection, outside=outside, titles=_TITLES, data=_data(inspection)
    )


def time(microseconds: float | None) -> str:
    return "–" if microseconds is None else _scaled(microseconds, ("µs", "ms", "s"))


def size(count: int) -> str:
    return f"{count}\u00a0B" if count < 1000 else _scaled(count / 1000, ("kB", "MB", "GB", "TB"))


def change(before: float | None, after: float | None) -> str:
    """In percent, with its sign; empty where there is nothing to compare."""
    if not before or after is None:
        return ""
    percent = round(100 * (after - before) / before)
    return f"{'+' if percent > 0 else '−' if percent < 0 else ''}{abs(percent)}\u00a0%"


def tone(change: str) -> str:
    """The CSS class of a change: everything on the page is better when there is less of it."""
    return {"−": "less", "+": "more"}.get(change[:1], "")


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """Three digits, in the first unit that needs no more than three before the point."""
    if not value:
        return f"0\u00a0{units[0]}"
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}\u00a0{units[0]}"


def _outside(variant: Variant, name: str) -> tuple[int, float]:
    works = [work for work in variant.outside if work.name == name]
    return sum(work.launches for work in works), sum(work.microseconds for work in works)


class _Table(dict[Any, int]):
    """Each distinct entry once, and its number: layers repeat the same code, lines and names dozens of times."""

    def __missing__(self, entry: Any) -> int:
        self[entry] = len(self)
        return self[entry]

    def numbers(self, entries: Iterable[Any]) -> list[int]:
        return [self[entry] for entry in entries]


def _data(inspection: Inspection) -> dict[str, Any]:
    """What report.js draws. Text, lines and values are numbers in kernels, and places in a list of their own."""
    texts, lines, values = _Table(), _Table(), _Table()

    def packed(kernel: Kernel) -> list[Any]:
        row = {field.name: getattr(kernel, field.name) for field in fields(Kernel)}
        row |= {name: texts[row[name]] for name in ("name", "kind", "fusion", "module", "code")}
        row |= {name: texts.numbers(row[name]) for name in ("ops", "nodes")}
        row |= {"lines": lines.numbers(kernel.lines)}
        row |= {"inputs": values.numbers(kernel.inputs), "outputs": values.numbers(kernel.outputs)}
        return list(row.values())

    cpu = inspection.device == "cpu"
    return {
        "variants": [
            {"name": v.name, "title": _TITLES.get(v.name, v.name), "kernels": [packed(k) for k in v.kernels]}
            for v in inspection.variants
        ],
        "layers": [[layer.index, layer.label] for layer in inspection.layers],
        "kinds": {
            "gemm": "GEMM",
            "attention": "Attention",
            "ours": "ours (CPU reference)" if cpu else "Triton (ours)",
            "inductor": "C++ (Inductor)" if cpu else "Triton (Inductor)",
            "collective": "Collective",
            "other": "Other",
        },
        "fields": {kind.__name__: [field.name for field in fields(kind)] for kind in (Kernel, Line, Value)},
        "texts": list(texts),
        "lines": [[line.file, line.line, line.code, line.module] for line in lines],
        "values": [[value.name, value.shape, value.dtype, value.bytes] for value in values],
    }
