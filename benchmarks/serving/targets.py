"""Servers under test: started for real, asked in their own form, always stopped."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.serving import models
from benchmarks.serving.device import DEVICE_VARIABLE
from benchmarks.serving.load import Kind
from benchmarks.serving.peers import environment_of
from benchmarks.serving.processes import started_ticks, tree
from benchmarks.serving.workload import Work
from broker.accounts.keys import KeyFile

__all__ = ["Target", "Tenant", "start"]

ROOT: Final = Path(__file__).parents[2]
NEARFAR: Final = "nearfar"
_START_S = 240.0
_BOUNDARY = "nearfar-benchmark"


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose requests: a key of the broker's."""

    name: str = "one"
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """A server that answers."""

    name: str
    port: int
    pid: int
    work: Work
    folder: Path
    keys: dict[str, str]
    model: str = ""

    def kind(
        self,
        body: bytes,
        *,
        name: str = "",
        share: float = 1.0,
        deadline_ms: int | None = None,
        tenant: str = "one",
        expect: bool = False,
        body_after_ms: float = 0.0,
    ) -> Kind:
        """One sort of request to this server."""
        path, headers, framed = _form(
            self, body, deadline_ms or self.work.deadline_ms, self.keys.get(tenant, "")
        )
        if expect:
            headers["Expect"] = "100-continue"
        lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(framed)}"]
        lines += [f"{key}: {value}" for key, value in headers.items()]
        body_path = self.folder / f"body-{len(list(self.folder.glob('body-*')))}"
        body_path.write_bytes(framed)
        return Kind(
            name=name or self.name,
            head="\r\n".join(lines) + "\r\n\r\n",
            body_path=str(body_path),
            share=share,
            expect=expect,
            body_after_ms=body_after_ms,
        )


def _form(
    target: Target, body: bytes, deadline_ms: int, key: str
) -> tuple[str, dict[str, str], bytes]:
    """Path, headers and body as this server wants them."""
    server = target.name.partition(" ")[0]
    if server == NEARFAR:
        headers = {"Authorization": f"Bearer {key}", "X-Deadline-Ms": str(deadline_ms)}
        if target.work.tensor:  # the model's own numbers and nothing else, as of the peers
            said = json.dumps(_tensor_request(len(body))).encode()
            headers |= {"Content-Type": "application/octet-stream"}
            headers |= {"Inference-Header-Content-Length": str(len(said))}
            return f"/v2/models/{target.model}/infer", headers, said + body
        headers["Content-Type"] = "image/jpeg"
        return f"/v1/models/{target.model}:predict", headers, body
    if server == "pytriton":
        counted = struct.pack("<I", len(body)) + body
        asked = {"inputs": [{"name": "content", "shape": [1, 1], "datatype": "BYTES",
                             "parameters": {"binary_data_size": len(counted)}}]}  # fmt: skip
        said = json.dumps(asked).encode()
        headers = {"Content-Type": "application/octet-stream"}
        headers["Inference-Header-Content-Length"] = str(len(said))
        return "/v2/models/m/infer", headers, said + counted
    if server == "litserve":
        return "/predict", *_multipart(body)
    if server == "bentoml":
        return "/predict", *_multipart(body)
    if server == "mlserver":
        sent = {"name": "content", "shape": [1], "datatype": "BYTES",
                "data": [base64.b64encode(body).decode()]}  # fmt: skip
        framed = json.dumps({"inputs": [sent]}).encode()
        return "/v2/models/m/infer", {"Content-Type": "application/json"}, framed
    return "/predict", {"Content-Type": "application/octet-stream"}, body


def _tensor_request(size_bytes: int) -> dict[str, object]:
    """Of the trivial model, in the Open Inference Protocol."""
    side = math.isqrt(size_bytes // 12)
    sent = {"name": "images", "shape": [1, 3, side, side], "datatype": "FP32",
            "parameters": {"binary_data_size": size_bytes}}  # fmt: skip
    asked = {"name": "scores", "parameters": {"binary_data": True}}
    return {"inputs": [sent], "outputs": [asked]}


def _multipart(body: bytes) -> tuple[dict[str, str], bytes]:
    opening = (
        f"--{_BOUNDARY}\r\nContent-Disposition: form-data; "
        'name="content"; filename="x.jpg"\r\nContent-Type: application/octet-stream\r\n\r\n'
    )
    framed = opening.encode() + body + f"\r\n--{_BOUNDARY}--\r\n".encode()
    return {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}, framed


@contextlib.contextmanager
def start(
    name: str, work: Work, folder: Path, tenants: tuple[Tenant, ...] = (Tenant(),)
) -> Iterator[Target]:
    """A server for the length of the block; ``name``: the broker, or a peer with configuration.

    Without ``tenants`` the broker asks nobody for a key.
    """
    folder.mkdir(parents=True)
    starter = _nearfar(work, folder, tenants) if name == NEARFAR else _peer(name, work, folder)
    with starter as target:
        yield target


@contextlib.contextmanager
def _nearfar(work: Work, folder: Path, tenants: tuple[Tenant, ...]) -> Iterator[Target]:
    keys = KeyFile(folder / "keys.json")
    asked = ["--keys", str(keys.path)] if tenants else []
    tokens = {tenant.name: _add_key(keys, tenant) for tenant in tenants}
    command = [
        sys.executable,
        "-m",
        "edge_runtime",
        "serve",
        "--port",
        "0",
        "--json-ready",
    ]
    command += ["--models", work.servable, *asked, "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if work.kind == "sleep":
        _write_entry_point(folder / "plugin")
        command += ["--executor", "sleep"]
        environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{folder / 'plugin'}"
        environment[DEVICE_VARIABLE] = f"{work.fixed_ms},{work.image_ms}"
    else:
        command += ["--threads", str(work.threads), "--runtime", work.runtime]
        command += ["--precision", work.precision]
        command += ["--calibration", work.calibration] if work.calibration else []
    if work.max_batch != 8:
        command += ["--max-batch", str(work.max_batch)]
    with _running(command, environment, folder / "log") as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        if not ready:
            raise SystemExit(f"the broker did not start:\n{(folder / 'log').read_text()[-2000:]}")
        said = json.loads(ready)
        port = int(said["url"].rpartition(":")[2])
        yield Target(NEARFAR, port, process.pid, work, folder, tokens, said["models"][0])


def _add_key(keys: KeyFile, tenant: Tenant) -> str:
    return keys.add(tenant.name, weight=tenant.weight, rate_per_s=100_000)[1]


def _write_entry_point(folder: Path) -> None:
    """The least that makes an executor known: the record of an installed distribution."""
    record = folder / "nearfar_sleep_device-1.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: nearfar-sleep-device\nVersion: 1\n"
    )
    (record / "entry_points.txt").write_text(
        "[nearfar.executors]\nsleep = benchmarks.serving.device:SleepDevice\n"
    )


@contextlib.contextmanager
def _peer(name: str, work: Work, folder: Path) -> Iterator[Target]:
    server, _, configuration = name.partition(" ")
    python = environment_of(server)
    assert python is not None, server
    port = _free_port()
    module = f"benchmarks.serving.servers.{server}_server"
    command = [str(python), "-m", module, str(port), configuration or "default"]
    command.append(msgspec.json.encode(work).decode())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DO_NOT_TRACK": "1"}
    with _running(command, environment, folder / "log", cwd=folder) as process:
        target = Target(name, port, process.pid, work, folder, {})
        _await_answer(target, process, folder / "log")
        yield target


@contextlib.contextmanager
def _running(
    command: list[str], environment: dict[str, str], log_path: Path, cwd: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=cwd,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        started = {pid: started_ticks(pid) for pid in tree(process.pid)[1:]}
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        # Children of a peer that outlived it, in its group and out of it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid, ticks in started.items():
            if ticks is not None and started_ticks(pid) == ticks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert process.stdout is not None
        process.stdout.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_answer(target: Target, process: subprocess.Popen[str], log_path: Path) -> None:
    """Return once a request is answered: some listen long before their model is there."""
    body = models.tensor() if target.work.tensor else models.photo()
    path, headers, framed = _form(target, body, target.work.deadline_ms, "")
    end_s = time.monotonic() + _START_S
    while time.monotonic() < end_s and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=10)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("POST", path, framed, headers)
            if connection.getresponse().status == 200:
                connection.close()
                return
        connection.close()
        time.sleep(0.2)
    raise SystemExit(f"{target.name} did not start:\n{log_path.read_text()[-2000:]}")
