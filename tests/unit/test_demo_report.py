"""The demo's figures and its page: exact numbers, nothing from outside."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edge_runtime.contract.errors import ConfigError, WireError
from edge_runtime.demo.device import choose_photos
from edge_runtime.demo.pipeline import Outcome, Settings, _fresh_logs
from edge_runtime.demo.records import DeviceEnd, DeviceReady, RequestRecord, decode_message
from edge_runtime.demo.report import broken_promises, build_report, install_seconds, write_reports
from edge_runtime.demo.scoring import percentile, score
from edge_runtime.results import InferenceSource

_DEADLINE_MS = 400.0


def _record(
    latency_ms: float,
    *,
    right: bool = True,
    cloud: bool = False,
    answered: bool = True,
    link_s: float = 0.0,
) -> RequestRecord:
    return RequestRecord(
        file="a.jpg",
        truth=3,
        link_s=link_s,
        latency_ms=latency_ms,
        predicted=(3 if right else 4) if answered else None,
        source=(InferenceSource.IN_CLOUD if cloud else InferenceSource.ON_DEVICE)
        if answered
        else None,
        action="CASCADE" if cloud else "LOCAL",
        reason="<b>&'quoted\"",
        upload_started=cloud,
        uploaded_bytes=1000 if cloud else 0,
        error=None if answered else "deadline_exceeded",
    )


def _outcome(
    adaptive: list[RequestRecord], device: list[RequestRecord] | None = None, **settings: object
) -> Outcome:
    chosen = Settings(output=Path("out"), requests=len(adaptive), **settings)  # type: ignore[arg-type]
    records = {
        "ONLY_ON_DEVICE": device or [_record(2.0, right=False) for _ in adaptive],
        "ONLY_IN_CLOUD": [_record(900.0, cloud=True) for _ in adaptive],
        "ADAPTIVE": adaptive,
    }
    end = DeviceEnd(uploaded_bytes=5000, downloaded_bytes=100)
    return Outcome(
        settings=chosen,
        records=records,
        scores={
            mode: score(found, end, deadline_ms=_DEADLINE_MS, variant="v", seconds=1.0)
            for mode, found in records.items()
        },
        stages={"convert": 12.5},
        zoo=[{"name": "digits-small", "test_accuracy": 0.9, "parameters": 12962}],
        proof={
            "variants": [
                {
                    "id": "tflite-int8", "passed": True, "reasons": [], "size_bytes": 22000,
                    "size_ratio": 0.37, "sqnr_db": 33.6, "agreement": 0.993, "accuracy": 0.9,
                }
            ]
        },
        gates_passed=True,
    )  # fmt: skip


def test_a_line_that_makes_no_sense_is_a_typed_error() -> None:
    for line in (b"", b"{}", b'{"type":"request"}', b"\xff", b"[]"):
        with pytest.raises(WireError):
            decode_message(line)
    assert decode_message(b'{"type":"ready","variant":null}') == DeviceReady(variant=None)


def test_a_work_folder_of_somebody_else_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="choose another --output"):
        _fresh_logs(tmp_path / "work")
    assert (tmp_path / "work" / "thesis.txt").read_text() == "mine"
    logs = _fresh_logs(tmp_path / "mine")
    (logs / "old.log").touch()
    assert not list(_fresh_logs(tmp_path / "mine").iterdir())


def test_late_wrong_and_missing_answers_are_told_apart() -> None:
    records = [
        _record(10.0),
        _record(400.0, cloud=True),
        _record(400.1, cloud=True),
        _record(20.0, right=False),
        _record(30_000.0, answered=False),
    ]
    result = score(
        records,
        DeviceEnd(uploaded_bytes=777, downloaded_bytes=5),
        deadline_ms=_DEADLINE_MS,
        variant=None,
        seconds=2.0,
    )
    assert result.requests == 5
    assert result.answered == 4
    assert result.accuracy_in_deadline == 2 / 5
    assert result.accuracy == 3 / 5
    assert result.in_deadline_share == 3 / 5
    assert result.offloaded_share == 2 / 5
    assert result.in_cloud_share == 2 / 5
    assert (result.p50_ms, result.p95_ms, result.max_ms) == (20.0, 400.1, 400.1)
    assert result.uploaded_bytes == 777


def test_percentiles_are_by_nearest_rank() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(i) for i in range(1, 101)], 0.95) == 95.0


def test_broken_promises_are_named() -> None:
    good = [_record(2.0) for _ in range(4)]
    assert broken_promises(_outcome(good)) == []
    assert "not more often right" in broken_promises(_outcome(good, device=good))[0]
    missing = broken_promises(_outcome([*good, _record(9.0, answered=False)]))
    assert missing == ["ADAPTIVE: 1 requests without an answer"]
    late = broken_promises(_outcome([*good, _record(401.0)], kill_broker=True))
    assert late == ["ADAPTIVE: 1 answers after the deadline"]
    ungated = _outcome(good)
    ungated.gates_passed = False
    ungated.proof["variants"][0]["passed"] = False
    assert broken_promises(ungated) == ["verify failed: tflite-int8"]


def test_report_json_has_the_published_keys(tmp_path: Path) -> None:
    outcome = _outcome([_record(2.0) for _ in range(4)])
    write_reports(outcome, build_report(outcome, 100.04), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report)[:5] == ["install_s", "run_s", "requests", "answered", "modes"]
    assert report["run_s"] == 100.0
    assert report["requests"] == report["answered"] == 12
    assert list(report["modes"]) == ["ONLY_ON_DEVICE", "ONLY_IN_CLOUD", "ADAPTIVE"]
    for figures in report["modes"].values():
        assert {
            "accuracy_in_deadline", "p50_ms", "p95_ms", "offloaded_share", "uploaded_bytes",
        } <= set(figures)  # fmt: skip
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html", "report.json", "requests.jsonl",
    ]  # fmt: skip


class _Page(HTMLParser):
    """Collects tags and fails on what is never closed."""

    void = frozenset({"meta", "circle", "line", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag == "circle":  # holds a title
            return
        assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_loads_nothing(tmp_path: Path) -> None:
    outcome = _outcome(
        [_record(2.0, cloud=bool(i % 2), link_s=0.1 * i) for i in range(6)], kill_broker=True
    )
    outcome.killed_at = 3
    write_reports(outcome, build_report(outcome, 1.0), tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert not re.search(r"https?:|//|src=|href=|url\(|@import|<script", text)
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;&#x27;quoted&quot;" in text
    assert sum(tag == "svg" for tag, _ in page.seen) == 3
    assert "prefers-color-scheme: dark" in text
    assert "broker killed" in text
    numbers = re.findall(r' (?:cx|cy|x1|y1|x|y)="([^"]*)"', text)
    assert numbers
    assert all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", number) for number in numbers)


def test_install_seconds_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert install_seconds() is None
    (tmp_path / ".install_seconds").write_text("nonsense\n")
    assert install_seconds() is None
    (tmp_path / ".install_seconds").write_text("182.4\n")
    assert install_seconds() == 182.4


def test_photos_are_all_used_once_before_one_comes_twice(tmp_path: Path) -> None:
    rows = [f"{i}.jpg,{i % 10},test" for i in range(7)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,class_index,split", *rows]))
    photos = choose_photos(tmp_path, 14, seed=3)
    assert len(set(photos[:7])) == len(set(photos[7:])) == 7
    assert photos == choose_photos(tmp_path, 14, seed=3)
    assert photos != choose_photos(tmp_path, 14, seed=4)
    (tmp_path / "labels.csv").write_text("file,class_index\n")
    with pytest.raises(ConfigError, match="no photos"):
        choose_photos(tmp_path, 1, seed=1)
