"""A runtime for monitoring: Prometheus text, and OpenTelemetry spans where that is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from edge_runtime.contract.errors import BackendUnavailable
from edge_runtime.log.entries import LogEntry
from edge_runtime.results import Status

__all__ = ["prometheus_text", "span_sink"]

_PREFIX: Final = "nearfar_edge_"
_BREAKER: Final = ("CLOSED", "HALF_OPEN", "OPEN")


class _Exposition:
    """Lines of the text exposition format, version 0.0.4."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def family(
        self,
        name: str,
        kind: str,
        help_text: str,
        samples: Mapping[tuple[tuple[str, str], ...], float],
    ) -> None:
        """One metric and its samples by their labels; without samples nothing is said."""
        if not samples:
            return
        self._lines.append(f"# HELP {_PREFIX}{name} {help_text}")
        self._lines.append(f"# TYPE {_PREFIX}{name} {kind}")
        for labels, value in samples.items():
            said = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
            self._lines.append(f"{_PREFIX}{name}{f'{{{said}}}' if said else ''} {value!r}")

    def text(self) -> str:
        """All of it."""
        return "\n".join(self._lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def prometheus_text(status: Status) -> str:
    """``status`` in Prometheus' text format; serve it as ``text/plain; version=0.0.4``.

    Counters count since the runtime was made; times are seconds. No label names an image,
    an answer or a person.
    """
    out, counts = _Exposition(), status.counts
    variant, broker = status.variant, status.broker
    out.family("info", "gauge", "What runs; always 1.", {
        (("bundle", status.bundle), ("policy", status.policy),
         ("variant", "" if variant is None else variant.variant),
         ("cloud_model", "" if broker is None else broker.model or "")): 1,
    })  # fmt: skip
    out.family("answers_total", "counter", "Answered requests, by the side that answered.", {
        (("source", "ON_DEVICE"),): counts.on_device,
        (("source", "IN_CLOUD"),): counts.in_cloud,
    })  # fmt: skip
    for name, help_text, value in (
        ("requests_total", "Requests that ended.", counts.requests),
        ("failed_total", "Requests that ended in an error.", counts.failed),
        ("late_total", "Answers after their deadline.", counts.deadline_missed),
        ("uploads_total", "Uploads started.", counts.uploads),
        ("uploaded_bytes_total", "Bodies of these uploads.", counts.uploaded_bytes),
    ):
        out.family(name, "counter", help_text, {(): value})
    if variant is not None:
        out.family("local_seconds", "gauge", "Quantiles of the last local runs.", {
            (("quantile", "0.5"),): variant.p50_ms / 1e3,
            (("quantile", "0.95"),): variant.p95_ms / 1e3,
        })  # fmt: skip
        out.family(
            "local_pending", "gauge", "Requests waiting for the local model or in it.",
            {(): variant.pending},
        )  # fmt: skip
    if broker is not None:
        out.family("breaker", "gauge", "1 for the state of the circuit breaker.", {
            (("state", state),): int(broker.breaker == state) for state in _BREAKER
        })  # fmt: skip
        for name, help_text, number in (
            ("connection_open", "1: a connection to the broker is open.", broker.connection_open),
            ("uplink_bytes_per_second", "Median belief of the upload rate.",
             broker.rate_bytes_per_s),
            ("round_trip_seconds", "Smoothed round trip to the broker.", broker.rtt_ms / 1e3),
            ("broker_queue_seconds", "Predicted wait at the broker.", broker.queue_ms / 1e3),
            ("broker_model_seconds", "Expected run of the cloud model.",
             broker.inference_ms / 1e3),
        ):  # fmt: skip
            out.family(name, "gauge", help_text, {(): float(number)})
    return out.text()


def span_sink(tracer: Any = None) -> Callable[[LogEntry], None]:
    """A sink for ``EdgeRuntime(log=...)`` that makes an OpenTelemetry span of each request.

    ``tracer``: an ``opentelemetry.trace.Tracer``; None: that of the global provider. The span
    is named ``nearfar.request`` and lasts from the call to the answer; each decision is an
    event in it. Raises ``BackendUnavailable`` when OpenTelemetry is not installed.
    """
    try:
        from opentelemetry import trace  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise BackendUnavailable(
            "spans need opentelemetry, which is not installed: pip install opentelemetry-api"
        ) from None
    chosen = tracer or trace.get_tracer("nearfar")

    def record(entry: LogEntry) -> None:
        outcome = entry.outcome
        begin_ns = int(entry.unix_s * 1e9)
        span = chosen.start_span(
            "nearfar.request", start_time=begin_ns, attributes=_attributes(entry)
        )
        if entry.steps:
            first_ms = entry.steps[0].situation.time_left_ms
            for step in entry.steps:
                after_ms = max(first_ms - step.situation.time_left_ms, 0.0)
                span.add_event(
                    "nearfar.decision",
                    {
                        "nearfar.action": step.decision.action.value,
                        "nearfar.reason": step.decision.reason,
                        "nearfar.p_cloud_in_deadline": step.decision.p_cloud_in_deadline,
                        "nearfar.expected_gain": step.decision.expected_gain,
                        "nearfar.price": step.decision.price,
                    },
                    timestamp=begin_ns + int(after_ms * 1e6),
                )
        if outcome.source is None:
            span.set_status(trace.Status(trace.StatusCode.ERROR, outcome.error))
        span.end(end_time=begin_ns + int(outcome.timings.total_ms * 1e6))

    return record


def _attributes(entry: LogEntry) -> dict[str, str | float | int | bool]:
    """Attributes of one request; what is not known is left out."""
    outcome = entry.outcome
    said: dict[str, str | float | int | bool | None] = {
        "nearfar.request": entry.request,
        "nearfar.bundle": entry.bundle,
        "nearfar.variant": entry.variant,
        "nearfar.task": entry.task,
        "nearfar.policy": entry.policy.name,
        "nearfar.action": entry.action,
        "nearfar.source": None if outcome.source is None else outcome.source.value,
        "nearfar.deadline_met": outcome.deadline_met,
        "nearfar.confidence": outcome.confidence,
        "nearfar.cloud": outcome.cloud,
        "nearfar.cloud_model": outcome.cloud_model,
        "nearfar.uploaded_bytes": outcome.uploaded_bytes,
        "nearfar.local_ms": outcome.timings.local_ms,
        "nearfar.cloud_ms": outcome.timings.cloud_ms,
        "error.type": outcome.error or outcome.other_error,
    }
    return {name: value for name, value in said.items() if value is not None}
