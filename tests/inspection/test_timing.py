"""Which GPU kernel belongs to which call, on events made by hand; tests/gpu has the real profiler."""

from dataclasses import dataclass, field
from typing import Any

from torch.autograd import DeviceType

from gemma4_compile.inspection.data import Kernel
from gemma4_compile.inspection.timing import Launched, assign, busy_microseconds, event_name, launched


def kernel(index: int, name: str) -> Kernel:
    return Kernel(index, name, "other", "", None, "", (), (), (), (), (), 0, 1, None, "")


KERNELS = [kernel(0, "extern_kernels.mm"), kernel(1, "triton_poi_0"), kernel(2, "extern_kernels.mm")]


def test_events_go_to_the_next_kernel_of_their_name() -> None:
    steps = [
        [Launched("aten::mm", True, 2, us), Launched("triton_poi_0", True, 1, 1.0), Launched("aten::mm", True, 1, 2 * us)]
        for us in (3.0, 5.0, 90.0)
    ]
    timed, outside = assign(KERNELS, steps)
    assert [(k.launches, k.microseconds) for k in timed] == [(2, 5.0), (1, 1.0), (1, 10.0)]
    assert outside == ()


def test_what_fits_no_kernel_is_outside() -> None:
    step = [Launched("aten::copy_", True, 1, 7.0), Launched("aten::mm", False, 1, 4.0), Launched("triton_poi_0", True, 1, 1.0)]
    timed, outside = assign(KERNELS, [step])
    assert [k.microseconds for k in timed] == [0.0, 1.0, 0.0]
    assert {(o.name, o.launches, o.microseconds) for o in outside} == {("aten::copy_", 1, 7.0), ("aten::mm", 1, 4.0)}


def test_what_one_step_alone_did_is_no_part_of_a_step() -> None:
    _, outside = assign(KERNELS, [[Launched("aten::empty", False, 4, 8.0)], [], []])
    assert outside == ()


def test_the_profilers_own_work_calls_nothing() -> None:
    step = Event(0, "gemma4_compile.step", Range(0, 100))
    graph = Event(1, "## Call CompiledFxGraph abc ##", Range(10, 90), step)
    flush = Event(2, "Activity Buffer Request", Range(20, 60), graph)
    product = Event(3, "aten::mm", Range(21, 39), flush, [Duration(4.0)])
    assert launched(step, [step, graph, flush, product]) == [Launched("aten::mm", True, 1, 4.0)]


def test_busy_is_the_union_of_the_kernels_of_a_step() -> None:
    step = Event(0, "gemma4_compile.step", Range(0, 100))
    spans = [(10, 20), (15, 30), (50, 60), (120, 130)]  # two overlap, one is of the next step
    kernels = [Event(i, "k", Range(*span), device_type=DeviceType.CUDA) for i, span in enumerate(spans, 1)]
    assert busy_microseconds(step, [step, *kernels]) == 30


def test_names_in_the_profiler() -> None:
    assert event_name("torch.ops.gemma4.route.default") == "gemma4::route"
    assert event_name("extern_kernels._grouped_mm") == "aten::_grouped_mm"
    assert event_name("triton_poi_0") == "triton_poi_0"


@dataclass
class Range:
    start: float
    end: float


@dataclass
class Duration:
    duration: float


@dataclass
class Event:
    id: int
    name: str
    time_range: Range
    cpu_parent: Any = None
    kernels: list[Duration] = field(default_factory=list)
    device_type: Any = DeviceType.CPU


def test_an_event_belongs_right_below_the_compiled_graph() -> None:
    step = Event(0, "gemma4_compile.step", Range(0, 100))
    graph = Event(1, "## Call CompiledFxGraph abc ##", Range(10, 90), step)
    attention = Event(2, "aten::_scaled_dot_product", Range(20, 40), graph)
    inner = Event(3, "aten::_flash", Range(21, 39), attention, [Duration(4.0), Duration(2.0)])
    mask = Event(4, "aten::add", Range(1, 2), step, [Duration(1.5)])
    later = Event(5, "aten::mm", Range(120, 130), None, [Duration(9.0)])
    assert launched(step, [step, graph, attention, inner, mask, later]) == [
        Launched("aten::add", False, 1, 1.5),
        Launched("aten::_scaled_dot_product", True, 2, 6.0),
    ]
