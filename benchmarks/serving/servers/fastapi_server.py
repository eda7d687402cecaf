"""FastAPI and uvicorn as most people write them: a function in the thread pool, one image."""

from __future__ import annotations

import sys

import msgspec
import uvicorn
from fastapi import Body, FastAPI

from benchmarks.serving.workload import Work, runner


def main() -> None:
    port, work = int(sys.argv[1]), msgspec.json.decode(sys.argv[3], type=Work)
    run = runner(work)
    app = FastAPI()

    @app.post("/predict")
    def predict(body: bytes = Body(media_type="application/octet-stream")) -> dict[str, int]:
        return {"answer": run([body])[0]}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", backlog=2048)


if __name__ == "__main__":
    main()
