"""BentoML with its adaptive batching. Tuned: ``max_latency_ms`` is the deadline.

A batchable method takes files as paths, one a request (docs: "Adaptive batching"). As it comes,
``max_latency_ms`` is a minute, so that nothing is refused.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import bentoml
import msgspec

from benchmarks.serving.workload import Work, runner

_WORK = "NEARFAR_BENCH_WORK"
_CONFIGURATION = "NEARFAR_BENCH_CONFIGURATION"
_UNTUNED_MS = 60_000


def _work() -> Work:
    return msgspec.json.decode(os.environ[_WORK], type=Work)


def _latency_ms() -> int:
    return _work().deadline_ms if os.environ[_CONFIGURATION] == "tuned" else _UNTUNED_MS


def main() -> None:
    port, os.environ[_CONFIGURATION], os.environ[_WORK] = sys.argv[1:]
    where = "benchmarks.serving.servers.bentoml_server:Model"
    command = [sys.executable, "-m", "bentoml", "serve", where, "--host", "127.0.0.1"]
    os.execv(sys.executable, [*command, "--port", port])  # noqa: S606


if __name__ == "__main__":
    main()  # the class below is made by what main starts


@bentoml.service(workers=1, traffic={"timeout": 120})  # type: ignore[untyped-decorator]
class Model:
    """One worker; its event loop and its thread for the model are in one process."""

    def __init__(self) -> None:
        self._run = runner(_work())

    @bentoml.api(  # type: ignore[untyped-decorator]
        batchable=True, max_batch_size=_work().max_batch, max_latency_ms=_latency_ms()
    )
    def predict(self, content: list[Path]) -> list[int]:
        return self._run([path.read_bytes() for path in content])
