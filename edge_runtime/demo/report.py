"""``report.json`` and ``report.html``: the same facts for machines and for people."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from html import escape
from pathlib import Path
from typing import Any, Final

import msgspec

from edge_runtime.demo.charts import accuracy_chart, latency_chart, timeline_chart
from edge_runtime.demo.pipeline import Outcome, Settings
from edge_runtime.policies.base import InferenceMode
from edge_runtime.simulation.links import find_schedule

__all__ = ["broken_promises", "build_report", "install_seconds", "write_reports"]

_ANSWERED: Final = (
    "A request is answered when a prediction came back, in time or late, right or wrong; an "
    "error is no answer. accuracy_in_deadline counts an answer only if it is right and came "
    "within the deadline. ONLY_IN_CLOUD waits for late answers up to give_up_ms; in the other "
    "modes the runtime is asked for an answer margin_ms before the deadline. A photo is taken "
    "every interval_ms, whether or not earlier ones are answered (four times as often in "
    "ONLY_ON_DEVICE, where no link plays a part). offloaded_share counts the photos whose "
    "upload was started, in_cloud_share those that the cloud answered. uploaded_bytes is "
    "what crossed the emulated uplink, connections and headers included."
)


def install_seconds() -> float | None:
    """How long ``make`` took to build this environment; None when something else built it."""
    try:
        return float((Path(sys.prefix) / ".install_seconds").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def broken_promises(outcome: Outcome) -> list[str]:
    """What the run should have shown and did not; empty when all went as promised."""
    settings, broken = outcome.settings, []
    if not outcome.gates_passed:
        failed = [v["id"] for v in outcome.proof.get("variants", []) if not v["passed"]]
        broken.append(f"verify failed: {', '.join(failed) or 'see logs/verify.log'}")
    for mode, score in outcome.scores.items():
        if score.answered < score.requests:
            broken.append(f"{mode}: {score.requests - score.answered} requests without an answer")
    adaptive = outcome.scores[InferenceMode.ADAPTIVE.value]
    device = outcome.scores[InferenceMode.ONLY_ON_DEVICE.value]
    if settings.kill_broker:
        late = round(adaptive.requests * (1 - adaptive.in_deadline_share))
        if late:
            broken.append(f"ADAPTIVE: {late} answers after the deadline")
    elif adaptive.accuracy_in_deadline <= device.accuracy_in_deadline:
        broken.append("ADAPTIVE is not more often right than ONLY_ON_DEVICE")
    return broken


def build_report(outcome: Outcome, run_s: float) -> dict[str, Any]:
    """The content of ``report.json``."""
    settings = outcome.settings
    return {
        "install_s": install_seconds(),
        "run_s": round(run_s, 1),
        "requests": sum(score.requests for score in outcome.scores.values()),
        "answered": sum(score.answered for score in outcome.scores.values()),
        "modes": {mode: msgspec.to_builtins(score) for mode, score in outcome.scores.items()},
        "definitions": _ANSWERED,
        "deadline_ms": settings.deadline_ms,
        "margin_ms": settings.margin_ms,
        "give_up_ms": settings.give_up_ms,
        "interval_ms": settings.interval_ms,
        "link": {
            "schedule": settings.schedule,
            "seed": settings.seed,
            "period_s": find_schedule(settings.schedule, settings.seed).period_s,
        },
        "broker_killed_after_request": outcome.killed_at,
        "broken_promises": broken_promises(outcome),
        "models": outcome.zoo,
        "conversion_s": outcome.conversion_s,
        "proof": outcome.proof,
        "stages_s": outcome.stages,
        "machine": {
            "cpus": os.cpu_count(),
            "architecture": platform.machine(),
            "system": platform.system(),
            "python": platform.python_version(),
        },
    }


def write_reports(outcome: Outcome, report: dict[str, Any], folder: Path) -> None:
    """Write ``report.json``, ``report.html`` and ``requests.jsonl``, each whole or not."""
    lines = [
        msgspec.json.encode({"mode": mode, **msgspec.to_builtins(record)})
        for mode, records in outcome.records.items()
        for record in records
    ]
    _write(folder / "requests.jsonl", b"\n".join(lines) + b"\n")
    _write(folder / "report.html", _page(outcome, report).encode())
    _write(folder / "report.json", json.dumps(report, indent=2).encode() + b"\n")


def _write(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        file.write(data)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


# The page ------------------------------------------------------------------------------

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #dfe4ea;
  --page: #ffffff; --card: #f6f8fa; --device: #c2700a; --cloud: #2463c9; --adaptive: #0f8a5f;
  --rate: #c9d3df; --bad: #c62f2f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa7b8; --line: #2d3643;
  --page: #12161c; --card: #1a2029; --device: #f0a23c; --cloud: #6ea8ff; --adaptive: #3fd39a;
  --rate: #34404f; --bad: #ff7b7b; } }
body { margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; color: var(--ink);
  background: var(--page); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); font-size: .92rem; }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: 10px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg text.value, svg text.label { fill: var(--ink); } svg text.value { font-weight: 600; }
svg .grid { stroke: var(--line); } svg .deadline { stroke: var(--bad); stroke-dasharray: 5 4; }
svg .rate { fill: var(--rate); } svg .curve { fill: none; stroke-width: 2.5; }
svg path.device { stroke: var(--device); } svg path.cloud { stroke: var(--cloud); }
svg path.adaptive { stroke: var(--adaptive); }
svg circle.device { fill: var(--device); } svg circle.cloud { fill: var(--cloud); }
svg circle.adaptive { fill: var(--adaptive); }
svg circle.held { fill: var(--page); stroke: var(--device); stroke-width: 1.5; }
svg circle.wrong { stroke: var(--bad); stroke-width: 2; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .5rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
.key span { display: inline-block; width: .8em; height: .8em; border-radius: 50%;
  margin: 0 .35em 0 1em; vertical-align: -.05em; }
.key .device { background: var(--device); } .key .cloud { background: var(--cloud); }
.key .adaptive { background: var(--adaptive); } .key .held { border: 2px solid var(--device); }
.key .wrong { border: 2px solid var(--bad); } .bad { color: var(--bad); font-weight: 600; }
.good { color: var(--adaptive); font-weight: 600; }
"""


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _milliseconds(value: float | None) -> str:
    return "&ndash;" if value is None else f"{value:.0f}"


def _modes_table(outcome: Outcome) -> str:
    rows = [
        [
            escape(mode),
            f"{score.accuracy_in_deadline:.1%}",
            f"{score.accuracy:.1%}",
            f"{score.in_deadline_share:.1%}",
            _milliseconds(score.p50_ms),
            _milliseconds(score.p95_ms),
            f"{score.offloaded_share:.1%}",
            f"{score.in_cloud_share:.1%}",
            f"{score.uploaded_bytes / 1e6:.2f}",
            f"{score.answered} / {score.requests}",
        ]
        for mode, score in outcome.scores.items()
    ]
    header = [
        "mode", "right in time", "right", "in time", "p50 ms", "p95 ms", "offloaded",
        "cloud answered", "MB up", "answered",
    ]  # fmt: skip
    return _table(header, rows)


def _variants_table(outcome: Outcome) -> str:
    rows = []
    for variant in outcome.proof.get("variants", []):
        passed = bool(variant["passed"])
        gate = "passed" if passed else "; ".join(variant["reasons"]) or "failed"
        accuracy = variant.get("accuracy")
        made_s = outcome.conversion_s.get(variant["id"])
        rows.append(
            [
                escape(str(variant["id"])),
                f"{variant['size_bytes'] / 1e3:.0f} kB",
                f"{variant['size_ratio']:.2f}",
                f"{variant['sqnr_db']:.1f}",
                f"{variant['agreement']:.1%}",
                "&ndash;" if accuracy is None else f"{accuracy:.1%}",
                "&ndash;" if made_s is None else f"{made_s:.1f}",
                f'<span class="{"good" if passed else "bad"}">{escape(gate)}</span>',
            ]
        )
    header = [
        "variant", "size", "of fp32", "SQNR dB", "agreement", "accuracy", "made in s", "gate",
    ]  # fmt: skip
    return _table(header, rows)


def _verdict(broken: list[str], settings: Settings) -> str:
    if broken:
        items = "".join(f"<li>{escape(text)}</li>" for text in broken)
        return f'<p class="bad">Not everything went as promised:</p><ul class="bad">{items}</ul>'
    kept = (
        "The broker was killed in the middle of the ADAPTIVE run; every adaptive request was "
        "still answered within its deadline."
        if settings.kill_broker
        else "Every request was answered, every variant passed its gate, and ADAPTIVE was right "
        "in time more often than the device alone."
    )
    return f'<p class="good">{kept}</p>'


def _page(outcome: Outcome, report: dict[str, Any]) -> str:
    settings = outcome.settings
    schedule = find_schedule(settings.schedule, settings.seed)
    adaptive = outcome.records[InferenceMode.ADAPTIVE.value]
    killed_s = adaptive[outcome.killed_at - 1].link_s if outcome.killed_at else None
    install_s = report["install_s"]
    stages = [[escape(name), f"{seconds:.1f}"] for name, seconds in outcome.stages.items()]
    models = "; ".join(
        f"{model['name']} {model['test_accuracy']:.1%} ({model['parameters']:,} parameters)"
        for model in sorted(outcome.zoo, key=lambda model: str(model["name"]), reverse=True)
    )
    machine = report["machine"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>nearfar demo</title><style>{_STYLE}</style></head><body>
<h1>nearfar demo</h1>
<p class="soft">{settings.requests} photos in each mode over the emulated
&ldquo;{escape(settings.schedule)}&rdquo; link (seed {settings.seed}), deadline
{settings.deadline_ms:g} ms. Models on all held-out test photos: {escape(models)}.</p>
{_verdict(report["broken_promises"], settings)}
<h2>Modes</h2>
{_modes_table(outcome)}
<p class="soft">{escape(_ANSWERED)}</p>
<p class="key soft"><span class="device"></span>ONLY_ON_DEVICE
<span class="cloud"></span>ONLY_IN_CLOUD <span class="adaptive"></span>ADAPTIVE</p>
<h2>What accuracy costs</h2>
<figure>{accuracy_chart(outcome.scores)}</figure>
<h2>How long answers take</h2>
<figure>{latency_chart(outcome.records, settings.deadline_ms)}</figure>
<h2>Where each ADAPTIVE request ran</h2>
<figure>{timeline_chart(adaptive, schedule, killed_s)}</figure>
<p class="key soft"><span class="cloud"></span>answered in the cloud
<span class="held"></span>asked, answered on the device in time
<span class="device"></span>answered on the device
<span class="wrong"></span>wrong answer. The gray area is the uplink rate; a gap is an outage.</p>
<h2>The bundle&rsquo;s variants</h2>
{_variants_table(outcome)}
<p class="soft">Each saved file was loaded by the interpreter that serves it and compared with
the fp32 model on the test photos.</p>
<h2>Where the time went</h2>
{_table(["stage", "seconds"], stages)}
<p class="soft">Run: {report["run_s"]:.1f} s (stages overlap). Installation:
{"not measured" if install_s is None else f"{install_s:.1f} s"}. {machine["cpus"]} CPUs,
{escape(machine["architecture"])}, {escape(machine["system"])}, Python
{escape(machine["python"])}.</p>
</body></html>
"""
