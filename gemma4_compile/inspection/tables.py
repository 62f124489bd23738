"""An inspection as text: what the command prints."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from .catalogue import LayerCount, count_by_layer
from .data import Inspection, Kernel, Variant

_KINDS = ("gemm", "attention", "ours", "inductor", "collective", "other")


def summary(found: Inspection, layer: int | None = None) -> str:
    """The passes, kernels a layer before and after, what each fusion saved, and the kernels of one layer.

    layer    the one to list; None: the first of each kind

    Raises ValueError for a layer that the model does not have.
    """
    check_layer(layer, len(found.layers))
    parts = [f"{found.model}: {found.step}, on {found.device}", passes_table(found), layers_table(found)]
    if found.fusions:
        parts.append(fusions_table(found))
    parts.append(catalogue_table(found, _shown(found, layer)))
    parts += [totals(variant) for variant in found.variants]
    return "\n\n".join([*parts, *found.notes])


def check_layer(layer: int | None, layers: int) -> None:
    """Raises ValueError for a layer that the model does not have."""
    if layer is not None and not 0 <= layer < layers:
        raise ValueError(f"the layer must be 0 to {layers - 1} for this model, got {layer}; choose one of them")


def only_layer(found: Inspection, layer: int) -> Inspection:
    """The same with the kernels of one layer."""
    ours, *plain = (replace(v, kernels=v.of_layer(layer)) for v in (found.ours, found.plain) if v)
    return replace(found, ours=ours, plain=plain[0] if plain else None)


def _shown(found: Inspection, layer: int | None) -> list[int]:
    if layer is not None:
        return [layer]
    return list({one.label.split(" of layer")[0]: one.index for one in reversed(found.layers)}.values())[::-1]


def totals(variant: Variant) -> str:
    """Kernels, bytes and times of a step in a line."""
    moved = sum(kernel.bytes for kernel in variant.kernels)
    line = f"{variant.name}: {variant.launches} kernels a step, {moved / 1e9:.3f} GB to move"
    line += f", first call {variant.compile_seconds:.1f} s"
    if variant.busy_microseconds is not None and variant.wall_microseconds is not None:
        line += (
            f"\n  GPU busy {variant.busy_microseconds / 1e3:.3f} ms a step, sum of the kernels "
            f"{variant.kernel_microseconds / 1e3:.3f} ms, wall {variant.wall_microseconds / 1e3:.3f} ms (launched from Python)"
        )
        works = ", ".join(f"{work.name} {work.launches}" for work in variant.outside)
        line += f"\n  launched outside the graph: {works or 'nothing'}"
    return line


def passes_table(found: Inspection) -> str:
    """Each pass: its time, its sites, and what did not match and why."""
    rows: list[Sequence[str]] = [("pass", "ms", "expected", "matched", "left", "lines changed")]
    for row in found.passes:
        expected = "-" if row.expected is None else str(row.expected)
        rows.append((row.name, f"{row.milliseconds:.1f}", expected, str(row.matched), str(row.left), str(row.changed_lines)))
    lines = _align(rows)
    for row in found.passes:
        for miss in row.unmatched:
            pattern = f" ({miss.pattern})" if miss.pattern else ""
            lines.append(f"  {row.name} did not match at {miss.site}: {miss.reason}{pattern}")
    return "\n".join(lines)


def layers_table(found: Inspection) -> str:
    """Kernels of each layer by class, and GPU time where there is one; plain -> ours where both were compiled."""
    labels = {layer.index: layer.label for layer in found.layers}
    counts = [{one.layer: one for one in count_by_layer(variant.kernels)} for variant in found.variants]
    timed = found.ours.busy_microseconds is not None
    rows: list[Sequence[str]] = [("layer", "kernels", *(["us"] if timed else []), *_KINDS, "")]
    for layer in [*labels, None]:
        if not any(layer in count for count in counts):
            continue
        here = [count.get(layer) or LayerCount(layer, Counter()) for count in counts]
        cells = [_arrow(str(one.total) for one in here)]
        if timed:
            cells.append(_arrow(f"{_time(variant.of_layer(layer)):.1f}" for variant in found.variants))
        cells += [_arrow(str(one.counts[kind]) for one in here) for kind in _KINDS]
        name = "none" if layer is None else str(layer)
        rows.append((name, *cells, "" if layer is None else labels[layer]))
    return "\n".join(_align(rows))


def fusions_table(found: Inspection) -> str:
    """What each fusion took out of the plain graph; the rows add up to both graphs."""
    timed = any(row.plain_us is not None for row in found.fusions)
    rows: list[Sequence[str]] = [
        ("fusion", "sites", "plain kernels", "now", "launches saved", *(["us saved"] if timed else []))
    ]
    for row in found.fusions:
        cells = [row.name, str(row.sites or "-"), str(row.plain), str(row.now), str(row.saved)]
        if timed:
            cells.append(f"{(row.plain_us or 0) - (row.now_us or 0):.1f}")
        rows.append(cells)
    return "\n".join(_align(rows))


def catalogue_table(found: Inspection, layers: Sequence[int | None] | None) -> str:
    """The kernels of some layers, or of all, in the order of the calls."""
    shown = [*(layer.index for layer in found.layers), None] if layers is None else layers
    labels: dict[int | None, str] = {layer.index: layer.label for layer in found.layers}
    blocks = []
    for variant in found.variants:
        for layer in shown:
            kernels = variant.of_layer(layer)
            if kernels:
                title = "in no layer" if layer is None else f"layer {layer}, {labels[layer]}"
                blocks.append("\n".join([f"{variant.name}, {title}", *_align([_row(kernel) for kernel in kernels])]))
    return "\n\n".join(blocks)


def _row(kernel: Kernel) -> tuple[str, ...]:
    line = kernel.lines[-1] if kernel.lines else None
    return (
        str(kernel.index),
        kernel.kind,
        kernel.name if len(kernel.name) <= 60 else kernel.name[:57] + "...",
        f"{kernel.bytes / 1e3:.1f} KB",
        "" if kernel.microseconds is None else f"{kernel.microseconds:.2f} us",
        kernel.module,
        f"{line.file.split('/')[-1]}:{line.line}" if line else "",
    )


def _time(kernels: Iterable[Kernel]) -> float:
    return sum(kernel.microseconds or 0.0 for kernel in kernels)


def _arrow(values: Iterable[str]) -> str:
    return " -> ".join(dict.fromkeys(values))


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
