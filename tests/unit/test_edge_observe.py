"""Monitoring: what a scraper reads, and a clear word where OpenTelemetry is missing."""

from __future__ import annotations

import sys

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge_runtime.conditions import Conditions
from edge_runtime.contract.errors import BackendUnavailable
from edge_runtime.observe import prometheus_text, span_sink
from edge_runtime.results import BrokerStatus, Counts, Status, VariantStatus
from tests.support.log_entries import entry

STATUS = Status(
    bundle='ti"ny\\\n@1',
    policy="ADAPTIVE",
    closed=False,
    variant=VariantStatus(
        variant="tflite-int8", format="tflite", precision="int8", reason="r", measured=(),
        p50_ms=12.5, p95_ms=40.0, pending=2,
    ),
    variant_error=None,
    broker=BrokerStatus(
        model="large@1", breaker="OPEN", obstacle=None, last_error=None, connection_open=True,
        rate_bytes_per_s=1.5e6, rate_log_deviation=0.5, rate_samples=3, rtt_ms=40.0,
        rtt_samples=2, queue_ms=5.0, inference_ms=30.0,
    ),
    conditions=Conditions(),
    counts=Counts(
        requests=10, on_device=6, in_cloud=3, failed=1, deadline_missed=2, uploads=5,
        uploaded_bytes=12_345,
    ),
)  # fmt: skip


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """As a scraper reads them: by name and sorted labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scraper_reads_every_figure() -> None:
    found = samples(prometheus_text(STATUS))
    prefix = "nearfar_edge_"
    assert found[prefix + "answers_total", (("source", "ON_DEVICE"),)] == 6
    assert found[prefix + "answers_total", (("source", "IN_CLOUD"),)] == 3
    expected = {
        "requests_total": 10, "failed_total": 1, "late_total": 2, "uploads_total": 5,
        "uploaded_bytes_total": 12_345, "local_pending": 2, "connection_open": 1,
        "uplink_bytes_per_second": 1.5e6, "round_trip_seconds": 0.04,
        "broker_queue_seconds": 0.005, "broker_model_seconds": 0.03,
    }  # fmt: skip
    assert {name: found[prefix + name, ()] for name in expected} == expected
    assert found[prefix + "local_seconds", (("quantile", "0.95"),)] == 0.04
    states = {s: found[prefix + "breaker", (("state", s),)] for s in ("CLOSED", "OPEN")}
    assert states == {"CLOSED": 0, "OPEN": 1}
    info = next(labels for name, labels in found if name == prefix + "info")
    assert dict(info)["bundle"] == STATUS.bundle, "quotes, backslashes and newlines survive"


def test_what_is_not_there_is_left_out() -> None:
    bare = msgspec.structs.replace(STATUS, variant=None, broker=None)
    names = {name for name, _ in samples(prometheus_text(bare))}
    assert not {n for n in names if "local" in n or "broker" in n or "breaker" in n}
    assert "nearfar_edge_requests_total" in names


def test_spans_without_opentelemetry_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(BackendUnavailable, match="pip install opentelemetry-api"):
        span_sink()


def test_with_opentelemetry_a_request_is_a_span_with_its_decisions() -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    sink = span_sink(provider.get_tracer("test"))
    sink(entry("a"))
    sink(entry("b", source=None, deadline_met=None, error="overloaded"))
    first, second = exporter.get_finished_spans()
    assert (first.end_time - first.start_time) / 1e6 == pytest.approx(25.0)
    assert [event.attributes["nearfar.action"] for event in first.events] == ["CASCADE"] * 2
    assert (first.events[1].timestamp - first.start_time) / 1e6 == pytest.approx(21.5)
    assert first.attributes["nearfar.source"] == "ON_DEVICE"
    assert first.status.is_ok or first.status.is_unset
    assert (second.status.is_ok, second.attributes["error.type"]) == (False, "overloaded")
