"""MLServer with adaptive batching, the model in one parallel worker, as its defaults have it.

Its REST has no binary tensors: bodies travel as base64 in JSON. It has no setting that refuses
or drops under overload.
"""

from __future__ import annotations

import asyncio
import base64
import os
import sys
from typing import Any

import msgspec
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

from benchmarks.serving.workload import Work, runner

_WORK = "NEARFAR_BENCH_WORK"


class Model(MLModel):  # type: ignore[misc]
    """A batch is one request, its elements one after the other."""

    async def load(self) -> bool:
        self._run_batch = runner(msgspec.json.decode(os.environ[_WORK], type=Work))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        elements: Any = payload.inputs[0].data
        sizes = self._run_batch([base64.b64decode(element) for element in elements])
        output = ResponseOutput(name="answer", shape=[len(sizes), 1], datatype="INT64", data=sizes)
        return InferenceResponse(model_name=self.name, outputs=[output])


async def serve(port: int, work: Work) -> None:
    settings = Settings(
        debug=False, host="127.0.0.1", http_port=port, grpc_port=0, metrics_endpoint=None
    )
    model = ModelSettings(
        name="m", implementation=Model, max_batch_size=work.max_batch, max_batch_time=0.005
    )
    await MLServer(settings).start(models_settings=[model])


def main() -> None:
    os.environ[_WORK] = sys.argv[3]
    asyncio.run(serve(int(sys.argv[1]), msgspec.json.decode(sys.argv[3], type=Work)))


if __name__ == "__main__":
    main()
