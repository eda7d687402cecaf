"""What a check runs on: two models, labeled photos, and links.

By default nothing from outside the project is needed: the zoo's small digits on the device, its
large ones in the broker, rendered photos, and a synthetic link. Photos are enlarged, so that
one of them costs a mobile uplink something.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from benchmarks.live_check.processes import nearfar
from edge_runtime.simulation.links import find_schedule
from edge_runtime.simulation.traces import Trace, read_traces

__all__ = [
    "Link",
    "Photos",
    "draw_offset_s",
    "flat",
    "make_bundle",
    "make_servable",
    "read_photos",
    "resolve_links",
]

_SCALE = 2
_QUALITY = 92
_SYNTHETIC_S = 180.0
_STEP_S = 0.2
_ALIVE_BINS = 30
_ALIVE_MBPS = 1.0


class Photos(msgspec.Struct, frozen=True):
    """One value per photo."""

    files: list[str]
    truth: list[int]


class Link(msgspec.Struct, frozen=True, eq=False):
    """A trace with its round trips, and the folder from which a relay reads the same one."""

    trace: Trace
    folder: Path


def make_bundle(work: Path) -> Path:
    """The zoo's small model, int8 for LiteRT."""
    bundle, calibration = work / "digits-small.bundle", work / "photos-calib"
    nearfar("zoo", "render", "--split", "calib", "-o", str(calibration), "--quiet")
    nearfar(
        "convert", "zoo:digits-small", "--to", "tflite", "--precision", "int8",
        "--calib", str(calibration), "-o", str(bundle), "--quiet",
    )  # fmt: skip
    return bundle


def make_servable(work: Path) -> Path:
    """The zoo's large model."""
    servable = work / "digits-large"
    nearfar("export", "zoo:digits-large", "-o", str(servable), "--quiet")
    return servable


def read_photos(
    folder: Path | None, labels: Path | None, count: int, seed: int, work: Path
) -> Photos:
    """Up to ``count`` photos in an order drawn from ``seed``; None: rendered digits.

    ``labels``: CSV with ``file``, ``class_index`` and maybe ``split`` (those of ``calib`` are
    left out); None: ``labels.csv`` in ``folder``.
    """
    if folder is None:
        folder = work / "photos-test"
        nearfar("zoo", "render", "--split", "test", "-o", str(folder), "--quiet")
        for path in folder.glob("*.jpg"):
            path.write_bytes(_enlarged(path))
    text = (labels or folder / "labels.csv").read_text()
    rows = [row for row in csv.DictReader(text.splitlines()) if row.get("split") != "calib"]
    order = np.random.default_rng(seed).permutation(len(rows))[:count]
    chosen = [rows[int(index)] for index in order]
    return Photos(
        files=[str(folder / row["file"]) for row in chosen],
        truth=[int(row["class_index"]) for row in chosen],
    )


def _enlarged(path: Path) -> bytes:
    with Image.open(path) as photo:
        size = (photo.width * _SCALE, photo.height * _SCALE)
        made = io.BytesIO()
        photo.resize(size, Image.Resampling.BICUBIC).save(made, "JPEG", quality=_QUALITY)
        return made.getvalue()


def resolve_links(folder: Path | None, names: list[str], seed: int, work: Path) -> list[Link]:
    """The named traces of ``folder``, or a synthetic one.

    Each is written once more with its round trips, so that simulator and relay read one text.
    """
    if folder is None:
        traces = [_synthetic(seed)]
    else:
        known = {trace.name: trace for trace in read_traces(folder).traces}
        missing = [name for name in names if name not in known]
        if missing or not names:
            raise SystemExit(f"no trace {missing or names}; there are: {', '.join(known)}")
        traces = [known[name] for name in names]
    return [_written(trace, work / f"link-{number}") for number, trace in enumerate(traces)]


def _synthetic(seed: int) -> Trace:
    """LTE that fades, then 3G, then LTE again: three minutes."""
    rates: list[float] = []
    round_trips: list[float] = []
    for number, name in enumerate(("lte", "3g", "lte")):
        schedule = find_schedule(name, seed + number)
        times = np.arange(round(_SYNTHETIC_S / 3 / _STEP_S)) * _STEP_S
        for time_s in times.tolist():
            rates += [schedule.at(time_s).uplink_mbps, schedule.at(time_s + 0.1).uplink_mbps]
            round_trips.append(schedule.at(time_s).rtt_ms)
    return Trace(
        name="synthetic",
        group="LTE",
        radio="lte",
        uplink_mbps=np.array(rates),
        rtt_ms=np.array(round_trips),
    )


def draw_offset_s(link: Link, rng: np.random.Generator) -> float:
    """Where to enter the trace: a multiple of 0.2 s at which a device can connect.

    Drawn from those after which a megabit a second passes for three seconds; from all, where
    there is none.
    """
    rates = link.trace.uplink_mbps
    drawn = 2 * rng.permutation(rates.size // 2)
    for first in drawn.tolist():
        if np.take(rates, range(first, first + _ALIVE_BINS), mode="wrap").min() >= _ALIVE_MBPS:
            return round(0.1 * first, 1)
    return round(0.1 * int(drawn[0]), 1)


def flat(mbps: float, rtt_ms: float, work: Path) -> Link:
    """A link that never changes: to measure the two sides without one that matters."""
    trace = Trace(
        name="flat",
        group="flat",
        radio="wifi",
        uplink_mbps=np.full(600, mbps),
        rtt_ms=np.full(300, rtt_ms),
    )
    return _written(trace, work / "link-flat")


def _written(trace: Trace, folder: Path) -> Link:
    if trace.rtt_ms is None:
        raise SystemExit(f"the trace {trace.name} has no round trips")
    folder.mkdir()
    times = np.arange(trace.uplink_mbps.size) / 10
    pairs = zip(times.tolist(), trace.uplink_mbps.tolist(), strict=True)
    (folder / "uplink.txt").write_text("".join(f"{at:.1f} {rate!r}\n" for at, rate in pairs))
    (folder / "rtt.txt").write_text("".join(f"{value!r}\n" for value in trace.rtt_ms.tolist()))
    row = f"played,{trace.group.replace(',', ' ')},{trace.radio},uplink.txt,rtt.txt\n"
    (folder / "index.csv").write_text("name,class,radio,uplink,rtt\n" + row)
    (read,) = read_traces(folder).traces
    return Link(trace=msgspec.structs.replace(read, name=trace.name), folder=folder)
