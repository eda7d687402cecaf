"""A broker under steady load while models come, go and change: no error, and no leak.

    python -m benchmarks.soak --json build/bench/soak.json [--requests 20000] [--minutes 10]

A real broker with a memory budget that its models do not fit into, asked over sockets by clients
that name a model, a version, or tensors, while an operator sets canaries and shadows, promotes,
rolls back, unloads and loads. It ends after so many requests or minutes, whichever comes first.
Reported are errors by kind, and how the resident memory of the front process and of the workers
grows with the requests (least squares, after the first part as warm-up). Exits 1 when there was
an error, or memory grows by more than 1 KiB a request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

from benchmarks.machine import describe_machine
from benchmarks.serving import models
from benchmarks.serving.processes import tree
from broker.accounts.keys import KeyFile
from edge_runtime.contract.files import atomic_directory
from edge_runtime.contract.manifest import SERVABLE_NAME, Servable, canonical_json

__all__ = ["Growth", "growth", "slope"]

_CALLERS: Final = 8
_SAMPLE_S: Final = 0.5
_BETWEEN_CHANGES_S: Final = 0.7
_WARM_UP_SHARE: Final = 0.3
_MOST_BYTES_PER_REQUEST: Final = 1024
_DEADLINE_MS: Final = 60_000
_KEPT_LINES: Final = 20
_MAIN, _OTHER = "trivial", "other"
_VERSIONS: Final = ("1.0.0", "2.0.0")


@dataclass(slots=True)
class Growth:
    """Resident memory against requests answered."""

    first_bytes: int
    last_bytes: int
    bytes_per_request: float


@dataclass(slots=True)
class _Run:
    """What is counted while it goes on."""

    answered: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[int, int, int]] = field(default_factory=list)
    """Requests answered, and resident bytes of the front process and of all others."""
    over: asyncio.Event = field(default_factory=asyncio.Event)


def slope(points: list[tuple[int, int]]) -> float:
    """Least-squares slope of y over x; 0 where all x are one."""
    count = len(points)
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def growth(points: list[tuple[int, int]]) -> Growth:
    """After the first requests, which fill caches and pools."""
    warm = points[-1][0] * _WARM_UP_SHARE
    kept = [point for point in points if point[0] >= warm]
    return Growth(kept[0][1], kept[-1][1], round(slope(kept), 2))


def _resident_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def _write_models(folder: Path) -> float:
    """Two versions of one model and one of another; the size of a program file in MB."""
    source = models.write_trivial(folder / "source")
    manifest = msgspec.json.decode((source / SERVABLE_NAME).read_bytes(), type=Servable)
    for name, version in [*((_MAIN, version) for version in _VERSIONS), (_OTHER, "1.0.0")]:
        with atomic_directory(folder / "models" / name / version) as work:
            for entry in manifest.files:
                (work / entry.path).write_bytes((source / entry.path).read_bytes())
            copy = msgspec.structs.replace(manifest, name=name, version=version)
            (work / SERVABLE_NAME).write_bytes(canonical_json(copy))
    return (source / manifest.model.path).stat().st_size / 1e6


@contextlib.contextmanager
def _broker(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, its URL, and an admin key."""
    size_mb = _write_models(folder)
    keys = KeyFile(folder / "keys.json")
    key = keys.add("soak", admin=True)[1]
    command = [sys.executable, "-m", "edge_runtime", "serve", "--port", "0", "--json-ready"]
    command += ["--models", str(folder / "models"), "--keys", str(keys.path)]
    command += ["--state", str(folder / "state"), "--device", "cpu", "--threads", "1"]
    command += ["--memory-budget", f"{2.5 * size_mb:.6f}"]
    with (folder / "broker.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        if not ready:
            sys.exit((folder / "broker.log").read_text()[-2000:])
        yield process, json.loads(ready)["url"], key
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


class _Soak:
    def __init__(self, url: str, key: str, requests: int, run: _Run) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {key}", "X-Deadline-Ms": str(_DEADLINE_MS)}
        self._requests = requests
        self._run = run
        self._numbers = itertools.count()
        self._photo = models.photo()
        self._tensor = models.tensor()
        self._stable = _VERSIONS[0]

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        async with aiohttp.ClientSession(headers=self._headers) as session:
            yield session

    async def caller(self) -> None:
        async with self._session() as session:
            while not self._run.over.is_set():
                number = next(self._numbers)
                if number >= self._requests:
                    self._run.over.set()
                    return
                try:
                    await self._ask(session, number)
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    self._run.errors[type(error).__name__] += 1

    async def _ask(self, session: aiohttp.ClientSession, number: int) -> None:
        path, body, headers = self._request(number)
        async with session.post(self._url + path, data=body, headers=headers) as response:
            data = await response.read()
            self._run.statuses[str(response.status)] += 1
            if response.status != 200:
                with contextlib.suppress(ValueError):
                    answer = json.loads(data)
                    said = f"{answer.get('code', '')} {answer.get('detail', answer.get('error'))}"
                    self._run.errors[f"{response.status} {said[:160]}"] += 1
                    return
                self._run.errors[f"{response.status}"] += 1
                return
            self._run.answered += 1
            if path.endswith(":predict"):
                model = json.loads(data)["model"]
                self._run.versions[f"{model['name']} {model['version']}"] += 1

    def _request(self, number: int) -> tuple[str, bytes, dict[str, str]]:
        """A kind in turn; every request of its own key where it has one."""
        photo = {"Content-Type": "image/jpeg"}
        match number % 5:
            case 0:
                return f"/v1/models/{_OTHER}:predict", self._photo, photo
            case 1:
                return f"/v1/models/{_MAIN}:predict?version=stable", self._photo, photo
            case 2:
                raw = {"Inference-Header-Content-Length": "0"}
                return f"/v2/models/{_MAIN}/infer", self._tensor, raw
            case _:
                key = {"Idempotency-Key": f"soak-{number}"}
                return f"/v1/models/{_MAIN}:predict", self._photo, photo | key

    async def operator(self) -> None:
        """One change after the other, none of which takes away what callers ask for."""
        async with self._session() as session:
            for number in itertools.count():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_BETWEEN_CHANGES_S):
                        await self._run.over.wait()
                if self._run.over.is_set():
                    return
                await self._change(session, number)

    async def _change(self, session: aiohttp.ClientSession, number: int) -> None:
        new = next(version for version in _VERSIONS if version != self._stable)
        trial = {"version": new, "percent": 40, "by": "request", "max_latency_ratio": 100}
        step = number % 6
        if step == 0:
            await self._route(session, {"action": "set_canary", "canary": trial})
        elif step == 1:
            change = {"action": "set_shadow", "shadow": {"version": new, "percent": 50}}
            await self._route(session, change)
        elif step == 2:
            await self._serve(session, "unload", _MAIN, new)
        elif step == 3:
            await self._serve(session, "load", _MAIN, new)
        elif step == 4 and number % 12 == 4:
            self._stable = new
            await self._route(session, {"action": "promote"})
        elif step == 4:
            await self._route(session, {"action": "rollback"})
        else:
            await self._serve(session, "load", _OTHER, None)

    async def _route(self, session: aiohttp.ClientSession, change: dict[str, Any]) -> None:
        await self._post(session, f"/v1/models/{_MAIN}/routing", change, change["action"])

    async def _serve(
        self, session: aiohttp.ClientSession, what: str, name: str, version: str | None
    ) -> None:
        body = {} if version is None else {"parameters": {"version": version}}
        await self._post(session, f"/v2/repository/models/{name}/{what}", body, what)

    async def _post(
        self, session: aiohttp.ClientSession, path: str, body: object, what: str
    ) -> None:
        async with session.post(self._url + path, json=body) as response:
            data = await response.read()
            if response.status == 200:
                self._run.changes[what] += 1
            else:
                text = data.decode("utf-8", "replace")[:200]
                self._run.errors[f"{what}: {response.status} {text}"] += 1

    async def watch(self, pid: int, end_s: float) -> None:
        """Memory now and then, and the end of the time."""
        while not self._run.over.is_set():
            others = [child for child in tree(pid) if child != pid]
            resident = sum(map(_resident_bytes, others))
            self._run.samples.append((self._run.answered, _resident_bytes(pid), resident))
            if time.monotonic() >= end_s:
                self._run.over.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SAMPLE_S):
                    await self._run.over.wait()

    async def metrics(self) -> dict[str, float]:
        """What the broker counted of loads, evictions and shadows."""
        async with self._session() as session, session.get(self._url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        wanted = ("nearfar_model_loads", "nearfar_model_evictions", "nearfar_rollbacks_total",
                  "nearfar_shadows_total", "nearfar_executor_restarts")  # fmt: skip
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in lines)
            if name.startswith(wanted)
        }


async def _soak(pid: int, url: str, key: str, requests: int, minutes: float) -> dict[str, Any]:
    run = _Run()
    soak = _Soak(url, key, requests, run)
    started_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(_CALLERS):
            group.create_task(soak.caller())
        group.create_task(soak.operator())
        group.create_task(soak.watch(pid, started_s + minutes * 60))
    seconds = time.monotonic() - started_s
    front = growth([(answered, bytes_) for answered, bytes_, _ in run.samples])
    workers = growth([(answered, bytes_) for answered, _, bytes_ in run.samples])
    counted = await soak.metrics()
    restarts = counted.get("nearfar_executor_restarts", 0.0)
    return {
        "requests": run.answered,
        "seconds": round(seconds, 1),
        "requests_per_s": round(run.answered / seconds, 1),
        "statuses": dict(run.statuses),
        "errors": dict(run.errors),
        "answered_by": dict(run.versions),
        "changes": dict(run.changes),
        "worker_restarts": int(restarts),
        "counted": counted,
        "front": msgspec.to_builtins(front),
        "workers": msgspec.to_builtins(workers),
        "samples": run.samples,
        "passed": {
            "no error": not run.errors,
            "every change was made": sum(run.changes.values()) > 0,
            "front grows by less than 1 KiB a request": (
                front.bytes_per_request < _MOST_BYTES_PER_REQUEST
            ),
            "workers grow by less than 1 KiB a request": (
                workers.bytes_per_request < _MOST_BYTES_PER_REQUEST
            ),
        },
    }


def _troubles(log: Path) -> list[str]:
    """What the broker logged of lost workers and failures, the latest lines."""
    names = ("worker_exited", "worker_failed", "worker_stderr", "batch_lost", "load_failed", "log",
             "unload_failed")  # fmt: skip
    found = [line for line in log.read_text().splitlines() if json.loads(line)["event"] in names]
    return found[-_KEPT_LINES:]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--json", type=Path, default=Path("build/bench/soak.json"))
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=10.0, help="at most so long")
    parser.add_argument("--quick", action="store_true", help="4000 requests, at most 2 minutes")
    arguments = parser.parse_args()
    requests = min(arguments.requests, 4000) if arguments.quick else arguments.requests
    minutes = min(arguments.minutes, 2.0) if arguments.quick else arguments.minutes
    with (
        tempfile.TemporaryDirectory(prefix="nearfar-soak-") as scratch,
        _broker(Path(scratch)) as (process, url, key),
    ):
        found = asyncio.run(_soak(process.pid, url, key, requests, minutes))
        found["log"] = _troubles(Path(scratch) / "broker.log")
    document = {"benchmark": "soak", "machine": describe_machine(), **found}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2))
    print(f"{found['requests']} requests in {found['seconds']} s, changes {found['changes']}")
    print(f"answered by {found['answered_by']}")
    for part in ("front", "workers"):
        grown = found[part]
        print(
            f"{part}: {grown['first_bytes'] / 1e6:.1f} to {grown['last_bytes'] / 1e6:.1f} MB, "
            f"{grown['bytes_per_request']:.0f} bytes a request"
        )
    if found["worker_restarts"]:
        print(f"the worker was replaced {found['worker_restarts']} times: see log in the report")
    for kind, count in found["errors"].items():
        print(f"error: {kind}: {count}")
    failed = [demand for demand, met in found["passed"].items() if not met]
    print(f"wrote {arguments.json}")
    if failed:
        sys.exit(f"not met: {', '.join(failed)}")


if __name__ == "__main__":
    main()
