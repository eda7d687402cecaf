"""The page, the table and the JSON of a simulation: complete, alone, and safe to open."""

from __future__ import annotations

import functools
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.contract.errors import ConfigError
from edge_runtime.simulation import world
from edge_runtime.simulation.cells import ARRIVALS, DEVICES, TEN_CELLS, CellSpec, parse_cells
from edge_runtime.simulation.cli import simulate
from edge_runtime.simulation.constants import load_constants
from edge_runtime.simulation.records import Event, SimulationResult
from edge_runtime.simulation.report.cells import Cell, Page, Session, colors
from edge_runtime.simulation.report.output import document, summary, write_text
from edge_runtime.simulation.report.page import render_page
from edge_runtime.simulation.report.plot import Label, log_ticks, place_labels, ticks
from edge_runtime.simulation.scores import score
from edge_runtime.simulation.session import split_names
from edge_runtime.simulation.terminal import traces_text
from edge_runtime.simulation.traces import RATE_UNITS, Skipped, Trace, TraceFolder, TraceSource
from tests.support.simulation import policy_run, result_of

_HOSTILE = "<script>alert('x')</script>&\"</title>"
_POLICIES = {
    "LocalOnly": 0.6, "CloudOnly": 0.2, "Hedged": 0.75, "Cascade(0.5)": 0.7, "Cascade(0.7)": 0.71,
    "Cascade(0.9)": 0.72, "LinUCB": 0.55, "ExpectedUtility:accuracy": 0.78,
    "ExpectedUtility:balanced": 0.77, "Oracle": 0.8, "Oracle:net": 0.79, "Oracle:saver": 0.78,
}  # fmt: skip


def _result(deadline_ms: float = 400.0, extra: str = "") -> SimulationResult:
    runs = [
        policy_run(
            policy, trace, right=right, group="3G" if trace == "b" else "LTE" + extra,
            latency_ms=math.inf if policy == "CloudOnly" and trace == "b" else 90.0 + 300 * right,
            kilobytes=0.0 if policy == "LocalOnly" else 50.0, joules=1.0, requests=40,
            p_cloud=[0.05, 0.5, 0.95, 0.75] * 10 if "Utility" in policy else (),
            cloud_in_time=[False, True, True, True] * 10 if "Utility" in policy else (),
        )
        for policy, right in _POLICIES.items()
        for trace in ("a" + extra, "b")
    ]  # fmt: skip
    result = result_of(runs, {"note": extra})
    return msgspec.structs.replace(result, deadline_ms=deadline_ms)


@functools.cache
def _page(*deadlines: float, extra: str = "") -> Page:
    traces = tuple(
        Trace(name=name, group="LTE", radio="lte", uplink_mbps=np.full(600, 5.0), rtt_ms=None)
        for name in ("a" + extra, "b")
    )
    sources = tuple(
        TraceSource(
            name=trace.name, file=f"up/{trace.name}", format="mahimahi", direction="its name",
            rtt=None, seconds=60.0, median_mbps=5.0, notes=("note" + extra,),
        )
        for trace in traces
    )  # fmt: skip
    results = [_result(deadline, extra) for deadline in deadlines or (400.0,)]
    run = next(r for r in results[0].runs if r.policy == "ExpectedUtility:balanced")
    events = (
        Event(time_s=3.0, kind="ping", request=-1),
        Event(time_s=1.0, kind="arrival", request=1),
    )
    rates = np.full(6000, 5.0)
    rates[100:150] = 0.0
    return Page(
        cells=tuple(Cell(result=result, scores=score(result)) for result in results),
        folder=TraceFolder(
            traces=traces, sources=sources,
            skipped=(Skipped(path="x.down" + extra, reason="a downlink's" + extra),),
        ),
        session=Session(
            run=msgspec.structs.replace(run, events=events),
            trace=traces[0],
            rates_mbps=rates,
        ),
        machine={"cpus": 2},
        run_s=12.34,
    )  # fmt: skip


class _Parser(HTMLParser):
    """Tags that are opened and closed, texts, and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("deadlines", [(400.0,), (300.0, 400.0, 800.0)])
def test_the_page_is_whole_and_asks_nothing_of_the_network(deadlines: tuple[float, ...]) -> None:
    text = render_page(_page(*deadlines))
    parser = _Parser()
    parser.feed(text)
    assert parser.open == []
    assert parser.addresses == []
    assert "script" not in parser.tags
    assert not re.search(r"url\(|@import|https?:", text)
    assert "nan" not in re.sub(r"<title>.*?</title>|<pre>.*?</pre>", "", text).lower()
    charts = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    assert len(charts) == 3 * len(deadlines) + 1 + (len(deadlines) > 1)
    for chart in charts:
        assert ET.fromstring(chart).get("aria-label")  # noqa: S314  # written here
    for policy in _POLICIES:
        assert policy in text


def test_nothing_from_outside_becomes_markup() -> None:
    text = render_page(_page(extra=_HOSTILE))
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert") > 5


def test_the_json_has_the_published_keys() -> None:
    page = _page()
    found = json.loads(json.dumps(document(page), allow_nan=False))
    assert found["cell"] == {"device": "mid", "deadline_ms": 400.0, "arrivals": "poisson"}
    own = found["policies"]["ExpectedUtility:balanced"]
    assert set(own) >= {
        "gain_capture", "net_gain_capture", "net_gain_capture_saver", "accuracy_in_deadline",
        "miss_rate", "mean_ms", "p95_ms", "kb_per_request", "wasted_kb_per_request",
        "joules_per_request", "offload_share", "brier", "decision_us", "reliability", "by_class",
    }  # fmt: skip
    assert set(own["gain_capture"]) == {"mean", "ci95"}
    assert own["gain_capture"]["mean"] == pytest.approx(0.85)
    assert set(own["by_class"]) == {"LTE", "3G"}
    assert found["seeds"] == [0]
    assert found["constants"] == {"note": ""}
    assert [trace["name"] for trace in found["traces"]["used"]] == ["a", "b"]
    assert found["traces"]["skipped"] == [{"path": "x.down", "reason": "a downlink's"}]
    assert found["machine"] == {"cpus": 2}
    assert set(found["definitions"]) >= {"gain_capture", "miss_rate", "decision_us"}
    several = document(_page(300.0, 800.0))
    assert [cell["cell"]["deadline_ms"] for cell in several["cells"]] == [300.0, 800.0]
    assert "policies" not in several


def test_the_table_fits_a_terminal_of_eighty_columns() -> None:
    lines = summary(_page(300.0, 400.0, 800.0)).splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if line.startswith("Hedged "))
    assert row.split() == [
        "Hedged",
        "75.0",
        "75..75",
        "78.7",
        "75.00",
        "0.0",
        "315",
        "50.0",
        "1.00",
    ]
    assert any(line.startswith("policy") and line.endswith("worst") for line in lines)
    wide = summary(msgspec.structs.replace(_page(), cells=_page().cells * 10))
    assert max(map(len, wide.splitlines())) <= 80


def test_used_and_skipped_files_are_told_with_reasons() -> None:
    text = traces_text(_page().folder)
    assert "2 traces used (LTE 2):" in text
    assert "a: lte, 60 s, median 5 Mbit/s" in text
    assert "mahimahi, uplink by its name, note; round trips: synthetic" in text
    assert "x.down: a downlink's" in text
    many = tuple(Skipped(path=f"f{i}.txt", reason="same") for i in range(40))
    folder = _page().folder
    crowded = TraceFolder(traces=folder.traces, sources=folder.sources, skipped=many)
    assert "f0.txt, f1.txt, f2.txt and 37 more: same" in traces_text(crowded)


def test_each_policy_keeps_its_color_and_the_bounds_share_one() -> None:
    shades = colors(_page(300.0, 800.0).cells)
    assert shades["Oracle"] == shades["Oracle:net"] == "bound"
    assert shades["ExpectedUtility:balanced"] == "own"
    assert shades["ExpectedUtility:accuracy"] == "own2"
    assert (shades["LocalOnly"], shades["CloudOnly"]) == ("local", "cloud")
    # The three best of the others by net utility, then gray.
    best = [shades[name] for name in ("Hedged", "Cascade(0.9)", "Cascade(0.7)")]
    assert best == ["c1", "c2", "c3"]
    assert shades["LinUCB"] == "rest"


def test_labels_cover_neither_points_nor_each_other() -> None:
    crowd = [Label(x=300.0, y=100.0 + 3 * i, radius=5, text=f"policy {i}") for i in range(12)]
    placed = place_labels(crowd, 400)
    assert 0 < len(placed) < 12
    apart = [Label(x=200.0, y=40.0 * i, radius=5, text=f"policy {i}") for i in range(1, 9)]
    assert len(place_labels(apart, 400)) == 8


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 100) == {0.0: "0", 20.0: "20", 40.0: "40", 60.0: "60", 80.0: "80", 100.0: "100"}
    assert list(log_ticks(30, 600)) == [50.0, 100.0, 200.0, 500.0]


def test_cells_are_ten_or_spelled_out() -> None:
    assert parse_cells("ten") == TEN_CELLS
    assert len(set(TEN_CELLS)) == 10
    assert parse_cells("mid:400:poisson, pi:1000:bursty") == (
        CellSpec("mid", 400.0, "poisson"),
        CellSpec("pi", 1000.0, "bursty"),
    )
    for text in ("", "eleven", "mid:400", "mid:x:poisson", "mid:nan:poisson", "mid:0:poisson",
                 "mid:1e9:poisson", "pixel:400:poisson", "mid:400:often"):  # fmt: skip
        with pytest.raises(ConfigError, match="no cell"):
            parse_cells(text)
    with pytest.raises(ConfigError, match="twice"):
        parse_cells("mid:400:poisson,mid:400:poisson")
    with pytest.raises(ConfigError, match="at most 32"):
        parse_cells(",".join(f"mid:{i}:poisson" for i in range(100, 150)))


def test_the_choices_of_the_command_are_those_of_the_world() -> None:
    assert set(DEVICES) == set(load_constants().devices)
    assert ARRIVALS == world.ARRIVALS
    options = {option.name: option.type for option in simulate.params}
    assert tuple(options["rate_unit"].choices) == tuple(RATE_UNITS)  # type: ignore[attr-defined]
    assert split_names("Cascade(0.5), Hedged,,Own(1,2)") == ("Cascade(0.5)", " Hedged", "Own(1,2)")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    write_text(target, "first")
    write_text(target, "second")
    assert target.read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    with pytest.raises(ConfigError, match="cannot write"):
        write_text(tmp_path / "none" / "out.json", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="cannot write"):
        write_text(tmp_path / "folder", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "out.json"]
