"""Ray Serve behind its HAProxy, one replica with ``@serve.batch``, in a cluster of its own.

Tuned: at most two batches in the replica, and half a batch before it; the rest is refused.
"""

from __future__ import annotations

import os
import signal
import sys

os.environ |= {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # it starts slowly on a few cores
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
}

import msgspec
import ray
from ray import serve
from starlette.requests import Request

from benchmarks.serving.workload import Work, runner


def main() -> None:
    port, tuned = int(sys.argv[1]), sys.argv[2] == "tuned"
    work = msgspec.json.decode(sys.argv[3], type=Work)
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    bounds = {"max_ongoing_requests": 1000}
    if tuned:
        most = 2 * work.max_batch
        bounds = {"max_ongoing_requests": most, "max_queued_requests": work.max_batch // 2}

    @serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 1}, **bounds)
    class Model:
        def __init__(self) -> None:
            self._run = runner(work)

        @serve.batch(max_batch_size=work.max_batch, batch_wait_timeout_s=0.005)
        async def predict(self, bodies: list[bytes]) -> list[int]:
            return self._run(bodies)

        async def __call__(self, request: Request) -> dict[str, int]:
            return {"answer": await self.predict(await request.body())}

    serve.run(Model.bind(), route_prefix="/predict")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main()
