"""LitServe with its dynamic batching. Tuned: its timeout at 0.65 of the deadline."""

from __future__ import annotations

import sys

import litserve
import msgspec

from benchmarks.serving.workload import Work, runner


class Api(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, work: Work) -> None:
        super().__init__(max_batch_size=work.max_batch, batch_timeout=0.005)
        self.work = work

    def setup(self, device: str) -> None:
        self.run_batch = runner(self.work)

    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return bytes(request["content"].file.read())

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return list(inputs)

    def unbatch(self, output: list[int]) -> list[int]:
        return output

    def predict(self, inputs: list[bytes]) -> list[int]:
        return self.run_batch(inputs)

    def encode_response(self, output: int) -> dict[str, int]:
        return {"answer": output}


def main() -> None:
    port, tuned = int(sys.argv[1]), sys.argv[2] == "tuned"
    work = msgspec.json.decode(sys.argv[3], type=Work)
    limit = {"timeout": 0.65 * work.deadline_ms / 1e3} if tuned else {}
    server = litserve.LitServer(Api(work), accelerator="cpu", **limit)
    server.run(host="127.0.0.1", port=port, log_level="error", generate_client_file=False)


if __name__ == "__main__":
    main()
