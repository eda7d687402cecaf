"""What the front process loads: no torch, and nothing heavy for a help text."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("broker.server", ["torch", "tensorflow", "coremltools", "converters"]),
        ("broker.executors.worker_process", ["torch", "aiohttp", "prometheus_client"]),
        ("broker.executors.oip", ["torch", "ray", "openvino"]),
        ("broker.executors.ray", ["torch", "ray", "openvino"]),
        ("broker.executors.zygote", ["torch", "aiohttp", "numpy"]),
        ("broker.cli", ["torch", "aiohttp", "numpy", "PIL"]),
    ],
)
def test_importing_it_loads_nothing_it_does_not_need(module: str, unwanted: list[str]):
    script = f"import sys, {module}; print(*[n for n in {unwanted!r} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == []
