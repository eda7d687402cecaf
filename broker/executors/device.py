"""The device that models run on: which, with how many threads, and its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Any

from broker.executors.base import Device
from edge_runtime.contract.errors import BackendUnavailable, ConfigError

__all__ = [
    "decode_threads",
    "forget_traces",
    "import_torch",
    "pick_device",
    "release_memory",
    "use_threads",
]


def decode_threads() -> int:
    """One a core of this process, eight at most: decoders leave the interpreter's lock."""
    return min(8, len(os.sched_getaffinity(0)))


def pick_device(wanted: Device) -> str:
    """``cuda`` where it is wanted or there, else ``cpu``. Raises ``ConfigError``."""
    torch = import_torch()
    available = bool(torch.cuda.is_available())
    if wanted == "cuda" and not available:
        raise ConfigError("torch finds no CUDA device: pass --device cpu, or auto")
    return "cuda" if available and wanted != "cpu" else "cpu"


def release_memory(device: str) -> None:
    """Hand what was freed back: from torch's cache to the device, from the heap to the system."""
    if device == "cuda":
        import_torch().cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def forget_traces() -> None:
    """Empty torch's caches of traced operators, which hold the shapes of every program loaded.

    They would grow by some 20 KB with each load for as long as the process lives: one of them,
    of ``ShapeEnv.constrain_symbol_range``, has no bound.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for cached in (FakeTensorMode, *vars(ShapeEnv).values()):
        while cached is not None:  # decorators hide the cache below them
            clear = getattr(cached, "cache_clear", None)
            if callable(clear):
                clear()
                break
            cached = getattr(cached, "__wrapped__", None)


def use_threads(threads: int) -> None:
    """Threads of one forward pass on the CPU, for this whole process."""
    import_torch().set_num_threads(threads)


def import_torch() -> Any:
    """Torch. Raises ``BackendUnavailable``."""
    try:
        import torch
    except ImportError as error:
        raise BackendUnavailable(f"torch: {error}; pip install 'nearfar[broker]'") from None
    return torch
