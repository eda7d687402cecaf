"""The HTML page of a proof: whole, escaped, from one file, and its verdict comes first."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from converters.report.charts import layer_chart, size_axis
from converters.report.html import render_html, write_html
from converters.report.records import LayerRow
from converters.verify.checks import Check
from converters.verify.figures import Finding
from converters.verify.gates import default_gates
from converters.verify.outcome import Report
from edge_runtime.bundle import Bundle
from edge_runtime.contract.errors import ConfigError
from tests.support.bundles import tiny_bundle
from tests.support.reports import (
    HOSTILE,
    entry,
    hostile_layers,
    hostile_report,
    hostile_samples,
    report,
)

PARITY = Finding(name="parity", detail="mean SQNR 9.0 dB is below 16.0 dB")
MISSING = Finding(name="backend_unavailable", detail="install nearfar[convert]")


def page_of(proof: Report, **extras: object) -> str:
    return render_html(proof, bundle=Bundle.open(tiny_bundle()), **extras)  # type: ignore[arg-type]


class _Page(HTMLParser):
    """Collects tags, texts and the style sheet; fails on what is never closed."""

    void = frozenset({"meta", "link", "img", "br", "circle", "line", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.style = ""
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("circle", "rect"):  # they hold a title
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.words.append(data)


def hostile_page() -> str:
    return page_of(
        hostile_report(),
        layers=hostile_layers(),
        samples=hostile_samples(),
        seconds={"tflite-int8": 2.0},
        gates=default_gates("classification"),
    )


def test_hostile_names_reach_the_page_as_text_only() -> None:
    text = hostile_page()
    page = _Page(text)
    assert page.open == []
    tags = {tag for tag, _ in page.seen}
    assert "script" not in tags
    assert tags <= {
        "html", "head", "meta", "link", "title", "style", "body", "header", "main", "section",
        "div", "p", "h1", "h2", "h3", "h4", "ul", "ol", "li", "dl", "dt", "dd", "table", "thead",
        "tbody", "tr", "th", "td", "b", "code", "span", "small", "br", "figure", "figcaption",
        "img", "details", "summary", "svg", "g", "line", "rect", "circle", "text",
    }  # fmt: skip
    for tag, attributes in page.seen:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert "style" not in attributes
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    shown = HOSTILE.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd")
    assert sum(shown in words for words in page.words) >= 8, (
        "title, findings, check, layers, labels"
    )


def test_the_page_loads_nothing_and_its_policy_forbids_it() -> None:
    page = _Page(hostile_page())
    for tag, attributes in page.seen:
        for name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:"), (tag, value)
    assert not re.search(r"url\(|@import|https?:", page.style)
    policy = next(
        a["content"] for t, a in page.seen if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_pictures_of_samples_are_in_the_page() -> None:
    samples = hostile_samples()
    page = _Page(page_of(report(entry("tflite-int8")), samples=samples))
    sources = [a["src"] for tag, a in page.seen if tag == "img"]
    assert samples[0].input is not None
    wanted = base64.b64encode(samples[0].input.data).decode()
    assert sources == [f"data:image/png;base64,{wanted}"]
    assert any("another first class" in words for words in page.words)


@pytest.mark.parametrize(
    ("variants", "checks", "sentence"),
    [
        ((entry("tflite-int8"),), (), "The variant passed its gate."),
        ((entry("tflite-int8"), entry("tflite-fp16")), (), "All 2 variants passed their gates."),
        (
            (entry("tflite-int8", PARITY), entry("tflite-fp16")),
            (),
            "1 of 2 variants failed and must not ship.",
        ),
        (
            (entry("tflite-int8", MISSING, sqnr_db=None, backend_missing=True),),
            (),
            "1 of 1 could not be run: no interpreter is installed.",
        ),
        (
            (entry("tflite-int8"),),
            (Check(name="labels", passed=False, detail="no better than chance"),),
            "A check of the bundle failed.",
        ),
    ],
)
def test_the_page_begins_with_the_verdict(
    variants: tuple[object, ...], checks: tuple[Check, ...], sentence: str
) -> None:
    proof = report(*variants, checks=checks)  # type: ignore[arg-type]
    words = "".join(_Page(page_of(proof)).words)
    first = words.index(sentence)
    assert first < words.index("judged on")
    for variant in proof.variants:
        for finding in variant.findings:
            assert f"[{finding.name}] {finding.detail}" in words[first : first + 400]
    for check in checks:
        assert f"[{check.name}] {check.detail}" in words[first : first + 400]


def test_bounds_stand_under_their_figures_and_the_missed_ones_are_marked() -> None:
    proof = report(entry("tflite-int8", PARITY, sqnr_db=9.0), entry("tflite-fp16", sqnr_db=62.0))
    text = page_of(proof, gates=default_gates("classification"))
    assert '<td class="missed">9.0<small>&ge; 16</small></td>' in text
    assert "<td>62.0<small>&ge; 30</small></td>" in text
    assert "<td>0.50<small>&le; 0.75</small></td>" in text
    assert text.count('class="missed"') == 1


def test_a_variant_without_figures_is_named_and_drawn_nowhere() -> None:
    proof = report(entry("tflite-fp16"), entry("coreml-fp16", MISSING, sqnr_db=None))
    text = page_of(proof)
    assert text.count('<circle class="dot ') == 2, "two charts, one dot each"
    assert "Did not run: coreml-fp16." in text
    nothing = page_of(report(entry("coreml-fp16", MISSING, sqnr_db=None)))
    assert "Size against" not in nothing


def test_charts_hold_plain_numbers_only_and_dots_lie_inside() -> None:
    numbers = re.findall(r' (?:cx|cy|x1|x2|y1|y2|x|y|width|height)="([^"]*)"', hostile_page())
    assert len(numbers) > 100
    assert all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", number) for number in numbers)
    wide = report(
        entry("tflite-fp32", sqnr_db=200.0, size_bytes=3 * 10**9),
        entry("tflite-int4w", sqnr_db=-200.0, size_bytes=1),
    )
    dots = re.findall(r'<circle class="dot [^"]*" cx="([0-9.]+)" cy="([0-9.]+)"', page_of(wide))
    assert len(dots) == 4
    assert all(52 <= float(x) <= 424 and 14 <= float(y) <= 258 for x, y in dots)


def test_labels_beside_dots_never_lie_on_each_other() -> None:
    crowd = [
        entry(f"{f}-{p}", sqnr_db=20.0 + k % 3, size_bytes=20_000 + 40 * k)
        for k, (f, p) in enumerate(
            (f, p)
            for f in ("tflite", "coreml")
            for p in ("int8", "int8w", "pal4", "int4w", "a16w8")
        )
    ]
    chart = page_of(report(*crowd)).split("<h3>Size against SQNR</h3>")[1].split("</svg>")[0]
    found = re.findall(r'<text class="value" x="([0-9.]+)" y="([0-9.]+)">([^<]+)<', chart)
    boxes = [(float(x), float(y), float(x) + 6 * len(text)) for x, y, text in found]
    assert 4 <= len(boxes) <= 10
    for number, (left, y, right) in enumerate(boxes):
        for other_left, other_y, other_right in boxes[number + 1 :]:
            apart = right <= other_left or other_right <= left or abs(y - other_y) >= 12
            assert apart, found
    assert chart.count("<title>tflite-") == 5, "whoever has no label has a tooltip"


def test_size_axis_has_readable_ticks_from_bytes_to_gigabytes() -> None:
    for sizes in ([1], [22_000, 59_000], [900, 3 * 10**9], [13e6, 14e6]):
        axis = size_axis("size", [float(size) for size in sizes])
        assert 0 <= len(axis.ticks) <= 8
        places = sorted(axis.share(value) for value in axis.ticks)
        assert all(right - left > 0.1 for left, right in pairwise(places)), sizes
    ticks = size_axis("size", [22_000.0, 59_000.0]).ticks
    assert ticks[20 * 1024] == "20 kB"
    assert ticks[50 * 1024] == "50 kB"


def test_layers_below_zero_are_drawn_downward_and_the_worst_are_listed() -> None:
    rows = [
        LayerRow(name=f"layer{n}", op="conv2d", sqnr_db=db) for n, db in enumerate((30, -12, 25))
    ]
    chart = layer_chart("layers", rows, [1])
    zero = [
        (float(y), float(h))
        for y, h in re.findall(r'<rect [^>]*y="([0-9.]+)"[^>]*height="([0-9.]+)"', chart)
    ]
    assert zero[0][0] + zero[0][1] == pytest.approx(zero[1][0], abs=0.2), "both start at zero"
    text = page_of(report(entry("tflite-int8"), layers={"tflite-int8": rows}))
    assert "<code>layer1</code> (conv2d): -12.0 dB" in text
    assert "<code>layer2</code>" not in text, "a quarter of the layers at most, and one at least"


def test_nothing_is_left_behind_where_the_page_cannot_be_written(tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle())
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ConfigError, match="choose another file"):
        write_html(report(entry("tflite-fp16")), tmp_path / "taken" / "p.html", bundle=bundle)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="choose another file"):
        write_html(report(entry("tflite-fp16")), tmp_path / "folder", bundle=bundle)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "taken"]
    write_html(report(entry("tflite-fp16")), tmp_path / "new" / "p.html", bundle=bundle)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["p.html"]
