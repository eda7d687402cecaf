"""The demo's child processes: real ones, and none is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from edge_runtime.contract.errors import ConversionError, NearfarError
from edge_runtime.demo.children import Children

_SLEEPER = "import time; print('up', flush=True); time.sleep(600)"
_PARENT = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(600)\n"
)
_STUBBORN = (
    "import signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('up', flush=True)\n"
    "time.sleep(600)\n"
)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def _ends(pid: int) -> None:
    for _ in range(500):
        if not _alive(pid):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"process {pid} still runs")


async def test_a_typed_error_of_a_child_keeps_its_code_and_names_the_log(tmp_path: Path) -> None:
    script = "import sys; sys.exit('noise\\nerror [conversion]: no such thing: try another')"
    async with Children(tmp_path) as children:
        child = await children.start("convert", ("-c", script))
        with pytest.raises(ConversionError) as caught:
            await child.finish()
    assert caught.value.detail == (
        f"convert failed (1): no such thing: try another; log: {tmp_path / 'convert.log'}"
    )
    assert "noise" in (tmp_path / "convert.log").read_text()


async def test_a_crash_is_told_with_its_last_line(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        child = await children.start("boom", ("-c", "raise ValueError('seven')"))
        with pytest.raises(NearfarError, match=r"boom failed \(1\): ValueError: seven; log: "):
            await child.finish()


async def test_a_killed_child_is_told_as_killed(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        child = await children.start("broker", ("-c", _SLEEPER), lines=True)
        assert await child.first_line(20) == b"up\n"
        child.kill()
        with pytest.raises(NearfarError, match="broker was killed by signal 9"):
            await child.finish()


async def test_a_child_that_ends_before_it_is_ready_is_an_error(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        child = await children.start("serve", ("-c", "import sys; sys.exit(3)"), lines=True)
        with pytest.raises(NearfarError, match=r"serve failed \(3\): no message"):
            await child.first_line(20)


async def test_a_child_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        child = await children.start("serve", ("-c", "import time; time.sleep(600)"), lines=True)
        with pytest.raises(NearfarError, match="not ready within 0 s"):
            await child.first_line(0.2)
        pid = child.process.pid
    assert not _alive(pid)


@pytest.mark.parametrize("how", ["end", "error", "cancel"])
async def test_children_and_their_children_end_with_the_block(tmp_path: Path, how: str) -> None:
    pids: list[int] = []
    ready = asyncio.Event()

    async def block() -> None:
        async with Children(tmp_path) as children:
            child = await children.start("parent", ("-c", _PARENT), lines=True)
            pids.extend([child.process.pid, int(await child.first_line(20))])
            assert all(map(_alive, pids))
            ready.set()
            if how == "error":
                raise RuntimeError
            if how == "cancel":
                await asyncio.sleep(600)

    task = asyncio.create_task(block())
    await ready.wait()
    if how == "cancel":
        task.cancel()
    with contextlib.suppress(RuntimeError, asyncio.CancelledError):
        await task
    for pid in pids:
        await _ends(pid)


async def test_what_a_killed_child_leaves_behind_is_stopped_too(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        child = await children.start("parent", ("-c", _PARENT), lines=True)
        grandchild = int(await child.first_line(20))
        child.kill()
        with pytest.raises(NearfarError, match="killed by signal 9"):
            await child.finish()
        assert _alive(grandchild)
    await _ends(grandchild)


async def test_a_child_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_runtime.demo.children._GRACE_S", 0.3)
    async with Children(tmp_path) as children:
        child = await children.start("stubborn", ("-c", _STUBBORN), lines=True)
        assert await child.first_line(20) == b"up\n"
    assert child.process.returncode == -9


async def test_a_child_has_no_terminal_and_a_group_of_its_own(tmp_path: Path) -> None:
    script = "import os, sys; print(os.getpgrp() == os.getpid(), sys.stdin.read() == '')"
    async with Children(tmp_path) as children:
        child = await children.start("alone", ("-c", script), lines=True)
        assert await child.first_line(20) == b"True True\n"
        assert os.getpgid(0) != child.process.pid
        assert await child.finish() == 0
