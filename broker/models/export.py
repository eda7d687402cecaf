"""Specs such as ``zoo:digits-large``: exported to a servable folder first, by a child.

The broker imports no converters; it only starts the command that does.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from pathlib import Path

from broker.executors.base import EventSink
from edge_runtime.contract.errors import ModelLoadError

__all__ = ["export_spec"]

_TIMEOUT_S = 1800.0
_KEPT_LINES = 20
_MAX_LINE_CHARS = 2048


async def export_spec(spec: str, target: Path, events: EventSink) -> None:
    """Run ``nearfar export SPEC -o TARGET`` and wait for it.

    What it prints becomes events. Raises ``ModelLoadError`` with its last line when it
    fails; canceled, the child is killed.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "edge_runtime",
        "export",
        spec,
        "-o",
        os.fspath(target),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    events("export_started", {"spec": spec, "pid": process.pid})
    last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await _relay(process, spec, last_lines, events)
            code = await process.wait()
    except TimeoutError:
        raise ModelLoadError(f"exporting {spec!r} took more than {_TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code != 0:
        reason = last_lines[-1] if last_lines else f"exit status {code}"
        raise ModelLoadError(f"cannot export {spec!r}: {reason}")
    events("export_done", {"spec": spec})


async def _relay(
    process: asyncio.subprocess.Process, spec: str, last_lines: deque[str], events: EventSink
) -> None:
    assert process.stdout is not None  # noqa: S101
    while True:
        try:
            line = await process.stdout.readline()
        except ValueError:  # longer than the reader's buffer: it dropped it
            continue
        if not line:
            return
        text = line.decode("utf-8", "backslashreplace").strip()[:_MAX_LINE_CHARS]
        if text:
            last_lines.append(text)
            events("export_output", {"spec": spec, "line": text})
