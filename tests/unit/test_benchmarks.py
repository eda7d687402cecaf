"""The benchmarks name themselves, and say what they ran on without saying where."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from benchmarks.__main__ import benchmarks
from benchmarks.machine import describe_machine

ROOT = Path(__file__).parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
    )  # fmt: skip


def test_every_module_with_a_main_is_listed_with_its_purpose() -> None:
    found = benchmarks()
    assert {"int8_latency"} <= set(found)
    assert not {"machine", "nets", "__main__"} & set(found)
    assert all(line for line in found.values())
    listed = _run("--list")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == sorted(found)


def test_unknown_benchmark_is_refused_with_the_names_there_are() -> None:
    done = _run("int9_latency")
    assert done.returncode == 2
    assert "there is no benchmark 'int9_latency'" in done.stderr
    assert "int8_latency" in done.stderr


def test_machine_is_described_without_its_name_or_paths() -> None:
    machine = describe_machine()
    assert machine["cores"] == len(os.sched_getaffinity(0))
    assert machine["cpu"]
    assert machine["packages"]["numpy"]
    text = json.dumps(machine)
    assert str(ROOT) not in text
    assert json.dumps(socket.gethostname()) not in text
