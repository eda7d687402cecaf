"""Triton by way of pytriton, with its dynamic batching.

Tuned: a queue policy that rejects what waited for 0.6 of the deadline, and at most two batches
in the queue.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, QueuePolicy, Tensor, TimeoutAction
from pytriton.triton import Triton, TritonConfig

from benchmarks.serving.workload import Work, runner


def main() -> None:
    port, tuned = int(sys.argv[1]), sys.argv[2] == "tuned"
    work = msgspec.json.decode(sys.argv[3], type=Work)
    run = runner(work)

    @batch
    def infer(content: Any) -> dict[str, Any]:
        return {"answer": np.array([[size] for size in run([bytes(row[0]) for row in content])])}

    policy = QueuePolicy(
        timeout_action=TimeoutAction.REJECT,
        default_timeout_microseconds=int(0.6e3 * work.deadline_ms),
        allow_timeout_override=True,
        max_queue_size=2 * work.max_batch,
    )
    batcher = DynamicBatcher(
        max_queue_delay_microseconds=5000, default_queue_policy=policy if tuned else None
    )
    config = TritonConfig(
        http_port=port, http_address="127.0.0.1", allow_grpc=False, allow_metrics=False
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="m",
            infer_func=infer,
            inputs=[Tensor(name="content", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="answer", dtype=np.int64, shape=(1,))],
            config=ModelConfig(max_batch_size=work.max_batch, batcher=batcher),
        )
        triton.serve()


if __name__ == "__main__":
    main()
