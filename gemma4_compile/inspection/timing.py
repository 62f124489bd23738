"""GPU time of each kernel call, from torch.profiler.

The compiled graph runs outside CUDA graphs here, one call after the other from Python, so each GPU kernel can be traced to the
call that launched it: every call in Inductor's code is an event of the profiler, in the order of the catalogue.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from .data import Kernel, Outside

_STEP = "gemma4_compile.step"
# The profiler's own work, which it reports as if what it interrupts were called by it.
_OVERHEAD = {"Activity Buffer Request", "Buffer Flush", "Command Buffer Full", "Instrumentation", "Resource", "Overhead"}
_INSIDE = ("## Call CompiledFxGraph", "Torch-Compiled Region", "Call CompiledFxGraph")
WARM_UP, STEPS = 3, 7


@dataclass(frozen=True)
class Launched:
    """An event of the profiler right inside the compiled graph (or, `inside` False, elsewhere in the step), with the GPU
    kernels it launched: how many, and their time in microseconds."""

    name: str
    inside: bool
    launches: int
    microseconds: float


@dataclass(frozen=True)
class Timing:
    """One profiled run: the kernels with their times, what ran outside the graph, and the step as a whole."""

    kernels: tuple[Kernel, ...]
    outside: tuple[Outside, ...]
    busy_microseconds: float
    wall_microseconds: float


def measure(prepare: Callable[[], Any], call: Callable[[Any], Any], kernels: Sequence[Kernel], trace: Path | None) -> Timing:
    """Time call(prepare()), a step on the current device whose catalogue is `kernels`: medians over STEPS steps, after WARM_UP.
    What prepare() does is not in the times.

    trace    where the profile goes, for Perfetto; None: nowhere
    """
    for _ in range(WARM_UP):
        call(prepare())
    walls = []
    for _ in range(STEPS):
        inputs = prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(inputs)
        torch.cuda.synchronize()
        walls.append((time.perf_counter() - start) * 1e6)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(STEPS):
            inputs = prepare()
            torch.cuda.synchronize()
            with record_function(_STEP):
                call(inputs)
                torch.cuda.synchronize()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    events = list(profiler.events() or ())
    steps = [event for event in events if event.name == _STEP and event.device_type == DeviceType.CPU]
    timed, outside = assign(kernels, [launched(step, events) for step in steps])
    busy = statistics.median(busy_microseconds(step, events) for step in steps)
    return Timing(timed, outside, busy, statistics.median(walls))


def launched(step: Any, events: Iterable[Any]) -> list[Launched]:
    """What one step launched, in order. An event counts where it hangs right below the compiled graph."""
    groups: dict[int, list[Any]] = {}
    owners: dict[int, tuple[Any, bool]] = {}
    for event in events:
        if event.device_type != DeviceType.CPU or not event.kernels or not _within(event, step):
            continue
        owner, inside = _owner(event)
        owners[owner.id] = (owner, inside)
        groups.setdefault(owner.id, []).extend(event.kernels)
    found = [
        (owner.time_range.start, Launched(owner.name, inside, len(groups[key]), sum(k.duration for k in groups[key])))
        for key, (owner, inside) in owners.items()
    ]
    return [group for _, group in sorted(found, key=lambda pair: pair[0])]


def _within(event: Any, step: Any) -> bool:
    return step.time_range.start <= event.time_range.start and event.time_range.end <= step.time_range.end


def _owner(event: Any) -> tuple[Any, bool]:
    """The outermost event below the compiled graph, or below the step where no compiled graph is around it."""
    chain = [event]
    while chain[-1].cpu_parent is not None and chain[-1].cpu_parent.name != _STEP:
        chain.append(chain[-1].cpu_parent)
    chain = [one for one in chain if one.name not in _OVERHEAD] or chain
    for place, parent in enumerate(chain):
        if parent.name.startswith(_INSIDE) and place:
            return chain[place - 1], True
    return chain[-1], False


def assign(kernels: Sequence[Kernel], steps: Sequence[Sequence[Launched]]) -> tuple[tuple[Kernel, ...], tuple[Outside, ...]]:
    """Kernels with the median of their times, and what belongs to none of them.

    Both lists are in the order of launches and name what they call, so each event goes to the next kernel of its name."""
    times: dict[int, list[float]] = defaultdict(list)
    counts: dict[int, int] = {}
    others: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for step in steps:
        place = 0
        rest: dict[str, tuple[int, float]] = {}
        for event in step:
            after = range(place, len(kernels)) if event.inside else ()
            index = next((i for i in after if event_name(kernels[i].name) == event.name), None)
            if index is None:
                launches, time_so_far = rest.get(event.name, (0, 0.0))
                rest[event.name] = (launches + event.launches, time_so_far + event.microseconds)
                continue
            times[index].append(event.microseconds)
            counts[index] = event.launches
            place = index + 1
        for name, one in rest.items():
            others[name].append(one)
    timed = tuple(
        replace(kernel, microseconds=statistics.median(times[i]) if times[i] else 0.0, launches=counts.get(i, 0))
        for i, kernel in enumerate(kernels)
    )
    outside = []
    for name, seen in others.items():
        seen += [(0, 0.0)] * (len(steps) - len(seen))  # the steps without it
        work = Outside(name, round(statistics.median(n for n, _ in seen)), statistics.median(t for _, t in seen))
        if work.launches:
            outside.append(work)
    return timed, tuple(outside)


def event_name(name: str) -> str:
    """What the profiler calls a kernel call of Inductor's code."""
    if name.startswith("torch.ops."):
        namespace, op = name.split(".")[2:4]
        return f"{namespace}::{op}"
    if name.startswith("extern_kernels."):
        return f"aten::{name.split('.')[-1]}"
    return name


def busy_microseconds(step: Any, events: Iterable[Any]) -> float:
    """The time in a step, which ends when the GPU is done, in which at least one kernel ran: the union of their intervals."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and event.name != _STEP
        and _within(event, step)
    )
    busy, end = 0.0, float("-inf")
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy
