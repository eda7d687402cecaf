"""Jobs are forked from a process that has imported their libraries, and are as safe as before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from converters import stacks
from converters.jobs import ConvertJob, Job, JobResult, PrepareJob, SourceRequest
from converters.supervisor import JobError, Supervisor
from converters.zygote import Forked, Zygote, ZygoteLost
from edge_runtime.contract.tasks import ClassificationTask
from edge_runtime.contract.tensors import TensorSpec

pytestmark = pytest.mark.slow

SPEC = TensorSpec(name="x", dtype="float32", shape=(1, 3, 8, 8), layout="NCHW")
SLEEPS = "import time\nprint('began', flush=True)\ntime.sleep(60)\n"


def _refused(folder: Path) -> ConvertJob:
    """A job that ends at once, with a typed error."""
    return ConvertJob(
        source=SourceRequest(source="zoo:digits-small"), format="tflite", precision="fp32",
        out_dir=str(folder), inputs=(SPEC,), outputs=(SPEC,), preprocess=None,
        task=ClassificationTask(classes=2), input_mode="image",
    )  # fmt: skip


def _endless(folder: Path) -> PrepareJob:
    (folder / "slow.py").write_text(SLEEPS)
    return PrepareJob(
        source=SourceRequest(source=f"{folder / 'slow.py'}:make", preprocess="unit"),
        out_dir=str(folder),
    )


class _Desk:
    """Hands jobs to one zygote."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.folder, self.zygote = folder, zygote
        self.log = folder / "log.txt"
        self.result = folder / "result.json"

    def spawn(self, job: Job, **environment: str) -> Forked:
        path = self.folder / "job.json"
        path.write_bytes(msgspec.json.encode(job))
        read_end, write_end = os.pipe()
        os.close(read_end)
        try:
            with self.log.open("wb") as log:
                return self.zygote.spawn(
                    path,
                    self.result,
                    environment={**os.environ, **environment},
                    log_fd=log.fileno(),
                    progress_fd=write_end,
                )
        finally:
            os.close(write_end)


@pytest.fixture(name="desk")
def _desk(tmp_path: Path) -> Iterator[_Desk]:
    zygote = Zygote(("json",), os.environ)
    yield _Desk(tmp_path, zygote)
    zygote.close()


def _until(condition: object, seconds: float = 30.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_each_job_leaves_its_result_and_its_status(desk: _Desk) -> None:
    pids = set()
    for _ in range(3):
        child = desk.spawn(_refused(desk.folder))
        assert child.wait(60) == 0
        result = msgspec.json.decode(desk.result.read_bytes(), type=JobResult)
        assert result.error_code == "precision_refused"
        pids.add(child.pid)
        child.close()
        desk.result.unlink()
    assert len(pids) == 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_killed_job_is_gone_and_the_next_one_runs(desk: _Desk) -> None:
    child = desk.spawn(_endless(desk.folder))
    _until(lambda: child.poll() is None and child.pid)
    child.kill()
    assert child.wait(10) == -9
    assert not Path(f"/proc/{child.pid}").exists()
    child.close()
    other = desk.spawn(_refused(desk.folder))
    assert other.wait(60) == 0
    other.close()


def test_jobs_end_when_nobody_listens_any_longer(desk: _Desk) -> None:
    child = desk.spawn(_endless(desk.folder))
    _until(lambda: child.poll() is None and child.pid)
    desk.zygote._control.close()
    _until(lambda: not desk.zygote.alive and not Path(f"/proc/{child.pid}").exists())
    child.close()


def test_a_job_whose_zygote_died_first_is_told_so(tmp_path: Path) -> None:
    zygote = Zygote(("no_such_module", "json"), os.environ)
    zygote._process.send_signal(signal.SIGSTOP)  # it will not see the job any more
    child = _Desk(tmp_path, zygote).spawn(_refused(tmp_path))
    zygote._process.kill()
    assert child.wait(30) == -9
    assert child.lost
    child.close()
    zygote._process.wait(30)
    with pytest.raises(ZygoteLost):
        _Desk(tmp_path, zygote).spawn(_refused(tmp_path))
    zygote.close()


def test_libraries_that_start_threads_are_not_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "starts_threads.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.getenv("PYTHONPATH", "")]))
    monkeypatch.setitem(stacks.PRELOADED, "convert-tflite", ("starts_threads",))
    seen = []
    supervisor = Supervisor(tmp_path / "work", listener=lambda *told: seen.append(told))
    for _ in range(2):
        result = supervisor.run_all([("one", _refused(tmp_path))])[0]
        assert isinstance(result, JobError)
        assert result.cause.code == "precision_refused"


def test_a_terminated_conversion_leaves_no_file_and_no_process(tmp_path: Path) -> None:
    """As a CI server ends a job: SIGTERM, to the command alone."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_runtime", "convert", "zoo:digits-small", "--to", "tflite",
         "--precision", "fp32", "-o", str(tmp_path / "out.bundle"), "--quiet"],
        env={**os.environ, "TMPDIR": str(scratch)},
    )  # fmt: skip
    try:
        _until(lambda: any(scratch.glob("nearfar-convert-*/jobs/*.json")), 60)
        _until(lambda: bool(_children(process.pid)))
        children = _children(process.pid)
        process.terminate()
        assert process.wait(30) == 143
    finally:
        process.kill()
        process.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert list(scratch.iterdir()) == []
    _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]
