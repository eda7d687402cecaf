"""Real uplinks that lie beside the checkout: read in full, by index and by content."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.simulation.traces import read_traces

TRACES = Path(__file__).parents[3] / "shared" / "data" / "traces"

pytestmark = [
    pytest.mark.shared_data,
    pytest.mark.skipif(not TRACES.exists(), reason="../shared/data/traces is not there"),
]


def test_every_trace_of_the_index_is_used() -> None:
    found = read_traces(TRACES)
    rows = (TRACES / "index.csv").read_text().splitlines()
    assert len(found.traces) == len(rows) - 1
    assert {trace.radio for trace in found.traces} == {"3g", "lte", "5g", "wifi"}
    for trace in found.traces:
        assert trace.rtt_ms is not None
        assert np.isfinite(trace.uplink_mbps).all()
        assert trace.uplink_mbps.size >= 100


def test_a_series_is_what_its_file_says() -> None:
    for trace, source in zip(
        *(getattr(read_traces(TRACES), name) for name in ("traces", "sources")), strict=True
    ):
        written = np.loadtxt(TRACES / source.file)
        assert trace.uplink_mbps.size == len(written)
        assert np.allclose(trace.uplink_mbps, written[:, 1], atol=2e-4)


def test_originals_are_read_by_what_they_hold() -> None:
    """The recorded packet opportunities give the rates of the prepared series."""
    found = read_traces(TRACES / "raw")
    (trace,) = found.traces
    assert (found.sources[0].format, trace.radio) == ("mahimahi", "lte")
    ready = next(t for t in read_traces(TRACES).traces if t.name.startswith("Verizon-LTE-short"))
    assert np.allclose(trace.uplink_mbps, ready.uplink_mbps, atol=1e-3)


def test_what_states_no_direction_waits_for_the_users_word(tmp_path: Path) -> None:
    shutil.copytree(TRACES / "raw" / "witestlab", tmp_path / "walks")
    (tmp_path / "a.up").write_text("".join(f"{i} 5\n" for i in range(60)))
    assert [trace.name for trace in read_traces(tmp_path).traces] == ["a.up"]
    found = read_traces(tmp_path, assume_uplink=True, rate_unit="bytes")
    assert len(found.traces) == 41
    wifi = next(t for t in found.traces if t.name == "walks/7_1_wifi")
    assert wifi.radio == "wifi"
    assert wifi.uplink_mbps[0] == pytest.approx(5471526 * 8 / 1e6)


def test_a_downlink_beside_an_uplink_is_left_alone(tmp_path: Path) -> None:
    original = TRACES / "raw" / "mahimahi" / "Verizon-LTE-short.up"
    shutil.copy(original, tmp_path / "walk.up")
    shutil.copy(original, tmp_path / "walk.down")
    found = read_traces(tmp_path, assume_uplink=True)
    assert [trace.name for trace in found.traces] == ["walk.up"]
    assert [skipped.path for skipped in found.skipped] == ["walk.down"]


def test_lists_of_round_trips_pair_with_their_link(tmp_path: Path) -> None:
    shutil.copytree(TRACES / "raw" / "memu22" / "ping", tmp_path / "ping")
    place = tmp_path / "throughput" / "static" / "lte"
    place.mkdir(parents=True)
    values = ",".join(str(40 + i % 5) for i in range(700))
    (place / "static_toward_p3_ul.list").write_text(f"Run 1\n{values}\n")
    found = read_traces(tmp_path)
    assert found.sources[0].rtt == "ping/static/lte/toward_p3.list"
