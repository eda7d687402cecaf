"""What a benchmark ran on: figures without this say little."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["describe_machine"]

_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile",
    "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip
"""Instruction sets that int8 and half-precision kernels are chosen by."""
_PACKAGES = (
    "nearfar", "numpy", "torch", "torchvision", "ai-edge-litert", "litert-torch",
    "ai-edge-quantizer", "executorch", "torchao", "coremltools", "tensorflow", "aiohttp",
)  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """Processor, memory, load, system and package versions; no host name, no path."""
    model, flags = _processor()
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "flags": [flag for flag in _FLAGS if flag in flags],
        "virtual": "hypervisor" in flags,
        "memory_bytes": _memory_bytes(),
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _processor() -> tuple[str, set[str]]:
    """Model name and instruction-set flags, as Linux tells them (x86 and ARM)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "", set()
    model, flags = "", set()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name" and not model:
            model = value.strip()
        elif name.strip() in ("flags", "Features"):
            flags |= set(value.split())
    return model, flags


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
