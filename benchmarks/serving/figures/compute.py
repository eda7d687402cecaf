"""A real model through the broker against the same program in a bare loop.

ResNet-18 with random weights from a JPEG, 32 callers. The bare loop decodes and runs with the
code of the broker's worker, in one process, one batch after the other, and talks to nobody.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec

import msgspec

from benchmarks.serving.figures.base import Bench, Finding, Row
from benchmarks.serving.load import Plan
from benchmarks.serving.measure import median, quantile, run_load
from benchmarks.serving.models import photo, write_photos
from benchmarks.serving.targets import NEARFAR, ROOT
from benchmarks.serving.workload import Work, runner
from broker.executors.runtimes.base import cpu_multiplies_bf16
from broker.executors.runtimes.calibration import LEAST_PHOTOS

CALLERS = 32
DEMANDED = 0.93
PEER_RATIO = 1.15
PHOTO_SIDES = (1280, 960)
BEST_RATIO = 2.0


def measure(bench: Bench) -> Finding:
    in_bf16 = cpu_multiplies_bf16()
    precision = "bf16" if in_bf16 else "auto"
    work = Work(kind="program", deadline_ms=60_000, servable=bench.resnet18, precision=precision)
    seconds = 6.0 if bench.quick else 12.0
    rows: list[Row] = []
    photo_path = bench.folder / "photo.jpg"
    photo_path.write_bytes(bench.photo)
    for number in bench.turns():
        for name in ("bare loop", *bench.servers(tuned=False)):
            if name == "bare loop":
                command = [sys.executable, "-m", "benchmarks.serving.figures.compute"]
                command += [msgspec.json.encode(work).decode(), str(photo_path), str(seconds)]
                environment = {**os.environ, "PYTHONPATH": str(ROOT)}
                row: Row = msgspec.json.decode(subprocess.check_output(command, env=environment))
                rows.append({"server": name, **row})
                continue
            rows.append(_asked(bench, name, work, bench.photo, seconds, number))
    bare = median([row["images_per_s"] for row in rows if row["server"] == "bare loop"])
    ours = median([row["images_per_s"] for row in rows if row["server"] == NEARFAR])
    for row in rows:
        row["of_the_bare_loop"] = round(row["images_per_s"] / bare, 4)
    passed = {"resnet18_93_percent_of_the_bare_loop": ours >= DEMANDED * bare}
    peers = [
        median([row["images_per_s"] for row in rows if row["server"] == peer])
        for peer in bench.servers(tuned=False)[1:]
    ]
    if peers and in_bf16:
        passed["resnet18_1.15_times_the_best_peer"] = ours >= PEER_RATIO * max(peers)
    return Finding(
        title="resnet18 from a JPEG, 32 callers",
        rows=rows,
        passed=passed,
        note="everybody runs the same program in bfloat16"
        if in_bf16
        else "in float32, as this processor does not multiply bfloat16: the model leaves no room "
        "between servers, so that peers are not judged",
    )


def best(bench: Bench) -> Finding:
    """Large photos: scaled decoding and each faster runtime against the best of each peer."""
    body = photo(*PHOTO_SIDES)
    seconds = 6.0 if bench.quick else 12.0
    servers = {name: (name, _photos(bench)) for name in bench.servers(tuned=False)[1:]}
    ways = _ways(bench)
    servers = {f"{NEARFAR} {way}": (NEARFAR, work) for way, work in ways.items()} | servers
    rows: list[Row] = []
    for number in bench.turns():
        for label, (name, work) in servers.items():
            rows.append({**_asked(bench, name, work, body, seconds, number), "server": label})
    by_server = {
        label: median([row["images_per_s"] for row in rows if row["server"] == label])
        for label in servers
    }
    ours = max(by_server[f"{NEARFAR} {way}"] for way in ways)
    peers = [by_server[label] for label, (name, _) in servers.items() if name != NEARFAR]
    passed = {}
    if peers:
        passed["large_photos_2_times_the_best_peer"] = ours >= BEST_RATIO * max(peers)
    dtype = "bfloat16" if cpu_multiplies_bf16() else "float32"
    return Finding(
        title="resnet18 from a photo of 1280 x 960, 32 callers",
        rows=rows,
        passed=passed,
        note=f"peers: PyTorch in {dtype}, with Pillow's scaled decoding",
    )


def _photos(bench: Bench, **asked: str) -> Work:
    return Work(kind="photo", deadline_ms=60_000, servable=bench.resnet18, **asked)  # type: ignore[arg-type]


def _ways(bench: Bench) -> dict[str, Work]:
    """How the broker can be told to compute; each is proved against fp32 as it loads."""
    if find_spec("openvino") is None:
        return {"auto": _photos(bench)}
    folder = bench.folder / "calibration"
    if not folder.exists():
        write_photos(folder, LEAST_PHOTOS)
    ways = {"int8": _photos(bench, runtime="openvino", precision="int8", calibration=str(folder))}
    if not bench.quick:
        precision = "bf16" if cpu_multiplies_bf16() else "fp32"
        ways[precision] = _photos(bench, runtime="openvino", precision=precision)
    return ways


def _asked(bench: Bench, name: str, work: Work, body: bytes, seconds: float, number: int) -> Row:
    """One server, by callers that ask again at once."""
    with bench.server(name, work) as target:
        plan = Plan(
            port=target.port,
            kinds=(target.kind(body),),
            give_up_ms=60_000,
            callers=CALLERS,
            seconds=seconds,
            seed=number + 1,
        )
        run = run_load(target, plan)
    answered = [record for record in run.records if record.status == 200]
    last_s = max((record.at_s + record.ms / 1e3 for record in answered), default=seconds)
    return {
        "server": name,
        "images_per_s": round(len(answered) / last_s, 2),
        "cpu_ms_per_image": round(run.cpu_s * 1e3 / max(len(answered), 1), 2),
        "failed": len(run.records) - len(answered),
        "p50_ms": quantile([record.ms for record in answered], 0.5),
        "p99_ms": quantile([record.ms for record in answered], 0.99),
        "load_average": run.load_average,
    }


def main() -> None:
    """The bare loop, in a process of its own."""
    work = msgspec.json.decode(sys.argv[1], type=Work)
    with open(sys.argv[2], "rb") as file:  # noqa: PTH123
        bodies = [file.read()] * work.max_batch
    run = runner(work)
    run(bodies)
    images = 0
    started_s, cpu_s = time.perf_counter(), time.process_time()
    while (elapsed_s := time.perf_counter() - started_s) < float(sys.argv[3]):
        images += len(run(bodies))
    cpu_s = time.process_time() - cpu_s
    said = {
        "images_per_s": round(images / elapsed_s, 2),
        "cpu_ms_per_image": round(cpu_s * 1e3 / images, 2),
        "load_average": round(os.getloadavg()[0], 2),
    }
    sys.stdout.write(msgspec.json.encode(said).decode())


if __name__ == "__main__":
    main()
