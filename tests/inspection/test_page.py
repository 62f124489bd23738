"""The page of an inspection: what is in the file, and what a reader can do with it in a browser."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma4_compile.inspection.data import (
    FusionRow,
    Inspection,
    Kernel,
    Kind,
    Layer,
    Line,
    Outside,
    PassRow,
    Unmatched,
    Value,
    Variant,
)
from gemma4_compile.inspection.page import change, render, size, time

from .browser import LOW_CONTRAST, chromium

HOSTILE = "x = '</script><script>window.broken = 1</script>' <!-- <b>bold</b> && {{ 7 * 7 }}"
SELECTED = ".block[aria-pressed=true]"
LABELS = ("sliding", "full", "sliding")
FILE = "transformers/models/gemma4/modeling_gemma4.py"


def kernel(kind: Kind, name: str, layer: int | None, nodes: str, us: float | None, moved: int, code: str = HOSTILE) -> Kernel:
    module = "lm_head" if layer is None else f"model.layers.{layer}.mlp"
    lines = (Line(FILE, 842, f"hidden_states = {name} < 1", module),)
    value = Value(f"{module}.weight", (1, 1536), "bfloat16", 3072)
    fusion = name.split(".")[3] if kind == "ours" else ""
    ops = ("aten.mul.Tensor", "aten.mul.Tensor")
    return Kernel(0, name, kind, fusion, layer, module, ops, lines, tuple(nodes.split()), (value,), (), moved, 1, us, code)


def step(name: str, layers: int, gpu: bool) -> Variant:
    """A layer is an mm and two small kernels, of which gemma4-compile makes one."""
    kernels = []
    for i in range(layers):
        kernels.append(kernel("gemm", "extern_kernels.mm", i, f"mm{i}", 20.0, 6_000_000, "extern_kernels.mm(arg0, arg1)"))
        if name == "plain":
            kernels.append(kernel("inductor", "triton_red_fused_mean_3", i, f"mean{i}", 30.0, 9000))
            kernels.append(kernel("inductor", "triton_poi_fused_add_mul_4", i, f"add{i} mul{i}", 10.0, 9000))
        else:
            kernels.append(kernel("ours", "torch.ops.gemma4.geglu.default", i, f"mean{i} add{i} mul{i}", 12.5, 9000))
    kernels.append(kernel("gemm", "extern_kernels.mm", None, "head", 200.0, 800_000_000))
    numbered = tuple(replace(one, index=i, microseconds=one.microseconds if gpu else None) for i, one in enumerate(kernels))
    outside = (Outside("aten::copy_", 3, 5.1), Outside("aten::copy_", 1, 0.4)) if gpu else ()
    busy = sum(one.microseconds or 0 for one in numbered) if gpu else None
    return Variant(name, numbered, outside, 31.2, busy, 2500.0 if gpu else None)


def made_up(gpu: bool = True, plain: bool = True, layers: int = 3) -> Inspection:
    miss = Unmatched("model.layers.1.mlp", "eps is 1e-05, expected <1e-06>", "patterns/geglu.py:41")
    return Inspection(
        model="Gemma <4>",
        step="decode, batch 1",
        device="NVIDIA H200" if gpu else "cpu",
        versions={"torch": "2.13.0"},
        layers=tuple(Layer(i, LABELS[i % 3]) for i in range(layers)),
        passes=(PassRow("functionalize", 0.4, None, 0, 0, 12), PassRow("geglu", 6.1, 3, 2, 1, 1700, (miss,))),
        ours=step("gemma4-compile", layers, gpu),
        plain=step("plain", layers, gpu) if plain else None,
        fusions=(FusionRow("geglu", 3, 6, 3, 120.0 if gpu else None, 37.5 if gpu else None),) if plain else (),
        notes=("made <b>up</b>",),
    )


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def words(page: str) -> str:
    """The page's text without markup, style and scripts, and with plain spaces."""
    body = re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).replace("&nbsp;", " ").split())


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (time(None), "–"),
        (time(0.0), "0 µs"),
        (time(6.123), "6.12 µs"),
        (time(99.96), "100 µs"),
        (time(999.6), "1.00 ms"),
        (time(5_240_000.0), "5.24 s"),
        (size(999), "999 B"),
        (size(3072), "3.07 kB"),
        (size(805_306_368), "805 MB"),
        (change(80.0, 60.0), "−25 %"),
        (change(100.0, 107.0), "+7 %"),
        (change(100.0, 100.1), "0 %"),
        (change(None, 3.0), ""),
    ],
)
def test_numbers_have_three_digits_and_a_unit(shown: str, expected: str) -> None:
    assert shown.replace("\u00a0", " ") == expected


def test_tables_say_what_was_found() -> None:
    text = words(render(made_up()))
    assert "Kernel launches a step 10 → 7 −30 %" in text
    assert "GPU busy time a step 380 µs → 298 µs −22 %" in text
    assert "geglu 3 6 → 3 3 120 µs → 37.5 µs −69 %" in text  # the fusion
    assert "geglu 6.10 ms 2 3 1 1,700 1 site" in text  # the pass
    assert "model.layers.1.mlp eps is 1e-05, expected &lt;1e-06&gt; patterns/geglu.py:41" in text
    assert "aten::copy_ 5.50 µs 4 launches 5.50 µs 4 launches" in text
    assert "made &lt;b&gt;up&lt;/b&gt;" in text and "Gemma &lt;4&gt;" in text


def test_without_gpu_bytes_take_the_place_of_time() -> None:
    page = render(made_up(gpu=False))
    assert "Bytes read and written a step 818 MB → 818 MB 0 %" in words(page)
    assert "GPU busy" not in page and "GPU work outside" not in page
    assert embedded(page)["kinds"]["ours"] == "ours (CPU reference)" and embedded(page)["kinds"]["inductor"] == "C++ (Inductor)"
    assert embedded(render(made_up()))["kinds"]["ours"] == "Triton (ours)"


def test_no_data_can_end_the_script_or_run() -> None:
    page = render(made_up())
    assert page.count("</script>") == 2 and page.count("<script") == 2 and "<!--" not in page
    assert HOSTILE in embedded(page)["texts"]
    assert "http-equiv" in page and "default-src 'none'" in page and "src=" not in page and "url(" not in page


def test_what_layers_repeat_is_stored_once() -> None:
    page = render(made_up(layers=35))
    data = embedded(page)
    assert len(data["texts"]) == len(set(data["texts"])) and data["texts"].count(HOSTILE) == 1
    assert len(data["lines"]) == 35 * 4 + 1  # four names a layer in the two variants, and the head
    code = "x = 1\n" * 1000
    bigger = [replace(one, code=code) for one in made_up(layers=35).ours.kernels]
    more = len(render(replace(made_up(layers=35), ours=replace(made_up(layers=35).ours, kernels=tuple(bigger))))) - len(page)
    assert abs(more) < 2 * len(code)


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """visit(inspection, width, scheme) -> the open page. Fails the test on errors and on requests for anything else."""
    errors: list[str] = []
    requests: list[str] = []
    contexts = []

    def visit(inspection: Inspection, width: int = 1400, scheme: str = "light", place: str = "") -> Any:
        path = tmp_path / "report.html"
        path.write_text(render(inspection), encoding="utf-8")
        contexts.append(
            browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
        )
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri() + place)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert errors == []
    assert requests and all(url.startswith(("file://", "data:")) for url in requests)


def marked(page: Any, selector: str) -> set[str]:
    return set(page.locator(selector).evaluate_all("found => found.map((block) => block.dataset.kernel)"))


def widths(page: Any, variant: str) -> list[float]:
    return page.locator(f'[data-variant="{variant}"] .block').evaluate_all(
        "all => all.map((b) => b.getBoundingClientRect().width)"
    )


def test_click_shows_lines_module_and_code_verbatim(visit: Callable[..., Any]) -> None:
    page = visit(made_up())
    page.click('[data-kernel="plain:1"]')
    assert page.locator("#detail .hf-line").all_inner_texts() == ["842\nhidden_states = triton_red_fused_mean_3 < 1"]
    detail = page.inner_text("#detail").replace("\u00a0", " ")
    for text in ("triton_red_fused_mean_3", "model.layers.0.mlp", HOSTILE, "aten.mul.Tensor ×2", "1 × 1536", "3.07 kB"):
        assert text in detail
    assert "Time\n30.0 µs" in detail and "Bandwidth\n300 MB/s" in detail and "Launches\n1" in detail
    assert page.locator("#detail b b, #detail script").count() == 0 and page.evaluate("window.broken") is None
    page.click('[data-kernel="gemma4-compile:1"]')
    assert "fusiongeglu" in page.inner_text("#detail").replace("\n", "").replace(" ", "")


def test_counterparts_in_the_other_row_are_marked(visit: Callable[..., Any]) -> None:
    page = visit(made_up())
    page.click('[data-kernel="gemma4-compile:1"]')
    assert marked(page, SELECTED) == {"gemma4-compile:1"} and marked(page, ".related") == {"plain:1", "plain:2"}
    assert page.locator(".links polygon").count() == 2
    page.hover('[data-kernel="plain:0"]')
    assert marked(page, ".related") == {"gemma4-compile:0"}
    page.hover("h1")
    assert marked(page, ".related") == {"plain:1", "plain:2"}
    page.click('[data-same="plain:2"]')
    page.mouse.move(0, 0)  # the page scrolled to the block, and another lies under the pointer
    assert marked(page, SELECTED) == {"plain:2"} and marked(page, ".related") == {"gemma4-compile:1"}


def test_layers_are_chosen_by_kind_number_and_column(visit: Callable[..., Any]) -> None:
    page = visit(made_up())
    assert [tab.split("\n")[0] for tab in page.locator("[data-layer-kind]").all_inner_texts()][-1] == "outside the layers"
    page.click('[data-layer-kind="full"]')
    assert marked(page, ".block") == {"plain:3", "plain:4", "plain:5", "gemma4-compile:2", "gemma4-compile:3"}
    assert page.inner_text("#layer-figure") == "Launches in layer 1\n3 → 2 −33\u00a0%"
    page.click('[data-layer-kind="sliding"]')
    page.click("text=›")
    assert "plain:6" in marked(page, ".block")  # layer 2, the other one of its kind
    page.click('[data-layer="outside"]')
    assert marked(page, ".block") == {"plain:9", "gemma4-compile:6"}
    page.select_option("select", index=0)
    assert page.inner_text("#overview-scale").replace("\u00a0", " ").endswith("it is 200 µs → 200 µs.")


def test_widths_are_to_one_scale(visit: Callable[..., Any]) -> None:
    page = visit(made_up())
    plain, ours = widths(page, "plain"), widths(page, "gemma4-compile")
    assert plain[1] / plain[0] == pytest.approx(1.5, abs=0.01) and ours[0] == pytest.approx(plain[0], abs=0.1)
    assert sum(ours) < 0.6 * sum(plain) and sum(plain) > 1200
    assert "less" in page.inner_text(".saved")
    page.click("[data-measure=bytes] >> nth=0")
    plain = widths(page, "plain")
    assert plain[0] > 1000 and 6 <= plain[1] == plain[2] <= 16
    assert "blocks are drawn wider" in page.inner_text("#scale")
    page.click("[data-measure=equal]")
    assert len({round(width) for width in widths(page, "plain") + widths(page, "gemma4-compile")}) == 1


def test_legend_counts_kinds(visit: Callable[..., Any]) -> None:
    items = [
        item.replace("\u00a0", " ").replace("\n", " ") for item in visit(made_up()).locator(".legend li").all_inner_texts()
    ]
    assert items == [
        "GEMM 1 → 1 kernel, 20.0 µs → 20.0 µs",
        "Triton (ours) 0 → 1 kernel, 0 µs → 12.5 µs",
        "Triton (Inductor) 2 → 0 kernels, 40.0 µs → 0 µs",
    ]


def test_without_gpu_or_comparison(visit: Callable[..., Any]) -> None:
    page = visit(made_up(gpu=False, plain=False))
    assert page.locator("#measure button").all_inner_texts() == ["Bytes", "Equal"]
    assert page.locator("[data-variant]").count() == 1 and page.locator(".links, .same").count() == 0
    page.click('[data-kernel="gemma4-compile:1"]')
    assert "µs" not in page.inner_text("#detail") and "Bandwidth" not in page.inner_text("#detail")


def test_keyboard(visit: Callable[..., Any]) -> None:
    page = visit(made_up())
    page.focus('[data-kernel="plain:0"]')
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert marked(page, SELECTED) == {"plain:1"}
    page.keyboard.press("ArrowDown")
    assert marked(page, ":focus") == {"gemma4-compile:1"} and marked(page, ".related") == {"plain:1", "plain:2"}
    assert page.locator(":focus").evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    page.focus('[data-layer-kind="sliding"]')
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator(":focus").get_attribute("data-layer-kind") == "full"


def test_place_is_kept_in_the_address(visit: Callable[..., Any]) -> None:
    page = visit(made_up())
    page.click('[data-layer="1"]')
    page.click('[data-kernel="plain:5"]')
    again = visit(made_up(), place=page.evaluate("location.hash"))
    assert marked(again, SELECTED) == {"plain:5"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_are_readable(visit: Callable[..., Any], scheme: str) -> None:
    page = visit(made_up(), scheme=scheme)
    background = "getComputedStyle(document.body).backgroundColor"
    first = page.evaluate(background)
    page.click('[data-kernel="gemma4-compile:1"]')
    for _ in range(2):
        result = page.evaluate(LOW_CONTRAST)
        assert result["found"] == [] and result["seen"] > 100
        page.click("#theme")
    assert page.evaluate(background) == first
    page.click("#theme")
    assert page.evaluate(background) != first
    assert page.inner_text("#theme") == ("Light theme" if scheme == "light" else "Dark theme")


@pytest.mark.parametrize("width", [1400, 420])
def test_only_boxes_scroll_sideways(visit: Callable[..., Any], width: int) -> None:
    inspection = made_up(layers=60)
    wide = tuple(replace(one, layer=0) if one.layer is not None else one for one in inspection.ours.kernels)
    page = visit(replace(inspection, ours=replace(inspection.ours, kernels=wide)), width=width)
    page.click('[data-kernel="gemma4-compile:1"]')
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert min(widths(page, "gemma4-compile")) >= 6
    scrolls = page.locator(".stage").evaluate("e => e.scrollWidth > e.clientWidth")
    assert scrolls == (width == 420)
