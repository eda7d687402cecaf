"""A child process never outlives those who wait for it."""

from __future__ import annotations

import os
import subprocess
import sys

TELLS = "from converters.worker import report_progress; report_progress('half way'); print('on')"


def _child(descriptor: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", TELLS],
        env={**os.environ, "NEARFAR_PROGRESS_FD": str(descriptor)},
        pass_fds=(descriptor,), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_child_whose_parent_was_killed_ends_at_its_next_step() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)  # as the parent's death does
    try:
        done = _child(write_end)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_a_child_that_is_listened_to_goes_on() -> None:
    read_end, write_end = os.pipe()
    done = _child(write_end)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as said:
        assert said.read() == b'{"message": "half way", "done": 0, "total": 0}\n'
    assert (done.returncode, done.stdout) == (0, "on\n")
