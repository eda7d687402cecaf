"""What every server is asked to run: the same work, the same bytes.

``sleep``: a device of known speed, T(n) = fixed + n * image milliseconds, one batch at a time;
it needs no processor, so what is seen is the server. ``program``: a servable, run by the very
code that the broker's worker runs, so that decoder and runtime are no difference. ``photo``:
ResNet-18 as a peer's user writes it at best, with Pillow's scaled decoding and PyTorch in
bfloat16 where the processor multiplies it; the broker runs its servable.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

__all__ = ["Work", "runner"]


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """One workload, as it is told to a server."""

    kind: Literal["sleep", "program", "photo"]
    deadline_ms: int
    max_batch: int = 8
    fixed_ms: float = 0.0
    image_ms: float = 0.0
    servable: str = ""
    tensor: bool = False
    """Bodies are tensors, not images."""
    threads: int = 1
    runtime: str = "auto"
    """Of the broker: what it is told by ``--runtime``."""
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Of a ``program``, and of the broker."""
    calibration: str = ""
    """Of the broker: a folder of photos that int8 is learned on."""

    @property
    def capacity_per_s(self) -> float:
        """Of the sleeping device, with full batches."""
        return self.max_batch * 1e3 / (self.fixed_ms + self.max_batch * self.image_ms)


def runner(work: Work) -> Callable[[Sequence[bytes]], list[int]]:
    """Runs a batch of bodies; one batch at a time, whoever calls."""
    lock = threading.Lock()
    run = {"sleep": _sleeper, "program": _program, "photo": _photo}[work.kind](work)

    def locked(bodies: Sequence[bytes]) -> list[int]:
        with lock:
            return run(bodies)

    return locked


def _sleeper(work: Work) -> Callable[[Sequence[bytes]], list[int]]:
    def run(bodies: Sequence[bytes]) -> list[int]:
        time.sleep((work.fixed_ms + len(bodies) * work.image_ms) / 1e3)
        return [len(body) for body in bodies]

    return run


def _photo(work: Work) -> Callable[[Sequence[bytes]], list[int]]:
    import io

    import numpy as np
    import torch
    import torchvision
    from PIL import Image

    from broker.executors.runtimes.base import cpu_multiplies_bf16

    torch.set_num_threads(work.threads)
    dtype = torch.bfloat16 if cpu_multiplies_bf16() else torch.float32
    model = torchvision.models.resnet18(weights=None).eval()
    model = model.to(memory_format=torch.channels_last).to(dtype)
    side = 224

    def decode(body: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(body))
        image.draft("RGB", (side, side))
        small = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        return np.asarray(small)

    def run(bodies: Sequence[bytes]) -> list[int]:
        pixels = torch.from_numpy(np.stack([decode(body) for body in bodies]))
        values = pixels.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)
        with torch.inference_mode():
            scores = model(values.to(dtype))
        return [int(best) for best in scores.argmax(1)]

    return run


def _program(work: Work) -> Callable[[Sequence[bytes]], list[int]]:
    from broker.executors.base import BatchItem
    from broker.executors.device import pick_device, use_threads
    from broker.executors.program import TorchProgram
    from broker.models.servable import open_servable
    from edge_runtime.contract.errors import NearfarError

    use_threads(work.threads)
    program = TorchProgram.load(
        open_servable(Path(work.servable)), pick_device("cpu"), precision=work.precision
    )
    extra = {"tensor": True, "outputs": (0,), "answered": False} if work.tensor else {}

    def run(bodies: Sequence[bytes]) -> list[int]:
        outcomes = program.run([BatchItem(body, **extra) for body in bodies])
        for outcome in outcomes:
            if isinstance(outcome, NearfarError):
                raise outcome
        return [len(body) for body in bodies]

    return run
