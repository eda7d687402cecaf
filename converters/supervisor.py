"""Start child processes for jobs, watch them, and turn what happens into typed results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from converters.jobs import Job, JobResult
from converters.resume import JobCache
from converters.stacks import stack_of
from converters.zygote import Forked, ZygoteLost, find_zygote
from edge_runtime.contract.errors import ConversionError, NearfarError, error_from_code

__all__ = ["JobError", "Listener", "Supervisor"]

Child = subprocess.Popen[bytes] | Forked

Listener = Callable[[str, str, int, int, int], None]
"""Called with (job name, message, done, of, resident bytes now)."""


class JobError(NearfarError):
    """A job failed; carries the child's own typed error and where its log lies."""

    code = "job"

    def __init__(self, name: str, cause: NearfarError, log: Path, result: JobResult) -> None:
        super().__init__(cause.detail)
        self.name = name
        self.cause = cause
        self.log = log
        self.result = result


def _resident_bytes(pid: int) -> int:
    if pid == 0:
        return 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0
    return 0


class _Files:
    """Where one job's messages lie."""

    def __init__(self, folder: Path, name: str) -> None:
        self.job = folder / f"{name}.json"
        self.result = folder / f"{name}.result.json"
        self.log = folder / f"{name}.log"
        self.scratch = folder / f"{name}.tmp"
        """The child's ``TMPDIR``. Libraries leave files there (coremltools: a copy of each
        model), and a child that ends at once, or is killed, cleans nothing up."""


def _start_anew(
    job: Path, result: Path, *, environment: Mapping[str, str], log_fd: int, progress_fd: int
) -> subprocess.Popen[bytes]:
    """A process that imports everything itself."""
    return subprocess.Popen(
        [sys.executable, "-m", "converters.worker", str(job), str(result)],
        stdin=subprocess.DEVNULL,
        stdout=log_fd,
        stderr=subprocess.STDOUT,
        env={**environment, "NEARFAR_PROGRESS_FD": str(progress_fd)},
        pass_fds=(progress_fd,),
        cwd=job.parent,
    )


class Supervisor:
    """Runs jobs in child processes, several at a time, each with its own log file."""

    def __init__(
        self,
        work_dir: Path,
        *,
        jobs: int = 1,
        timeout_s: float = 3600.0,
        listener: Listener | None = None,
        cache: JobCache | None = None,
    ) -> None:
        self.work_dir = work_dir
        self.cache = cache
        self.jobs = max(1, jobs)
        self.timeout_s = timeout_s
        self.listener = listener
        self._children: set[Child] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run_all(self, jobs: Sequence[tuple[str, Job]]) -> list[JobResult | JobError]:
        """Run named jobs, at most ``jobs`` at a time; results in the given order.

        A job that fails gives a ``JobError`` in its place. An exception in the caller's
        thread (Ctrl-C) stops every child before it goes on.
        """
        with ThreadPoolExecutor(max_workers=self.jobs) as pool:
            futures = [pool.submit(self._run_caught, name, job) for name, job in jobs]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self.stop()
                raise

    def run(self, name: str, job: Job) -> JobResult:
        """Run one job. Raises the child's own typed error."""
        result = self.run_all([(name, job)])[0]
        if isinstance(result, JobError):
            raise type(result.cause)(result.cause.detail) from result
        return result

    def stop(self) -> None:
        """Kill the children that still run."""
        with self._lock:
            self._stopped = True
            for child in self._children:
                child.kill()

    def _run_caught(self, name: str, job: Job) -> JobResult | JobError:
        try:
            return self._run(name, job)
        except JobError as error:
            return error

    def _run(self, name: str, job: Job) -> JobResult:
        known = self.cache.get(job) if self.cache is not None else None
        if known is not None:
            if self.listener is not None:
                self.listener(name, "taken from an earlier run", 0, 0, 0)
            return known
        result = self._run_child(name, job)
        if self.cache is not None:  # before anyone moves what the job wrote
            self.cache.put(job, result)
        return result

    def _run_child(self, name: str, job: Job) -> JobResult:
        folder = self.work_dir / "jobs"
        folder.mkdir(parents=True, exist_ok=True)
        files = _Files(folder, name)
        files.job.write_bytes(msgspec.json.encode(job))
        files.scratch.mkdir(exist_ok=True)
        try:
            return self._run_in(files, name, job)
        finally:
            shutil.rmtree(files.scratch, ignore_errors=True)

    def _run_in(self, files: _Files, name: str, job: Job) -> JobResult:
        start = time.monotonic()
        stack = stack_of(job)
        zygote = None if stack is None else find_zygote(stack, self._environment())
        for spawn in (None if zygote is None else zygote.spawn, _start_anew):
            if spawn is None:
                continue
            files.result.unlink(missing_ok=True)
            try:
                status = self._attend(name, spawn, files)
            except ZygoteLost:
                continue
            return self._collect(name, status, files.result, files.log, start)
        raise AssertionError("a new process is never a lost one")

    def _attend(self, name: str, spawn: Callable[..., Child], files: _Files) -> int:
        """Start a child and wait for its end; its exit status. Raises ``ZygoteLost``."""
        read_end, write_end = os.pipe()
        try:
            with files.log.open("wb") as log:
                child = spawn(
                    files.job,
                    files.result,
                    environment={**self._environment(), "TMPDIR": str(files.scratch)},
                    log_fd=log.fileno(),
                    progress_fd=write_end,
                )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        with self._lock:
            self._children.add(child)
            if self._stopped:
                child.kill()
        watcher = threading.Thread(
            target=self._watch, args=(name, child, read_end), name=f"watch-{name}", daemon=True
        )
        watcher.start()
        try:
            status = child.wait(timeout=self.timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            detail = f"no result after {self.timeout_s:.0f} s"
            raise self._error(name, detail, files.log, JobResult()) from None
        finally:
            watcher.join(timeout=5.0)
            with self._lock:
                self._children.discard(child)
            if isinstance(child, Forked):
                child.close()
        if isinstance(child, Forked) and child.lost and not self._stopped:
            raise ZygoteLost
        return status

    def _collect(
        self, name: str, status: int, result_path: Path, log_path: Path, start: float
    ) -> JobResult:
        if not result_path.exists():
            reason = f"was killed by signal {-status}" if status < 0 else f"exited with {status}"
            raise self._error(name, f"the child process {reason}", log_path, JobResult())
        result = msgspec.json.decode(result_path.read_bytes(), type=JobResult)
        result.seconds = time.monotonic() - start
        if result.error_code:
            cause = error_from_code(result.error_code, result.error_detail)
            raise JobError(name, cause, log_path, result)
        return result

    def _error(self, name: str, detail: str, log: Path, result: JobResult) -> JobError:
        return JobError(name, ConversionError(f"{detail}; its log: {log}"), log, result)

    def _environment(self) -> dict[str, str]:
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        flatc = Path(sys.prefix) / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"
        return {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "PYTHONHASHSEED": "0",
            "CUDA_VISIBLE_DEVICES": "",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TF_ENABLE_ONEDNN_OPTS": "0",
            "KERAS_BACKEND": "torch",
            "TOKENIZERS_PARALLELISM": "false",
            # ExecuTorch's exporter calls flatc by name.
            "PATH": os.pathsep.join(
                [
                    str(flatc / "executorch" / "data" / "bin"),
                    str(Path(sys.executable).parent),
                    os.environ.get("PATH", ""),
                ]
            ),
        }

    def _watch(self, name: str, child: Child, read_end: int) -> None:
        message, done, total = "starting", 0, 0
        buffer = b""
        os.set_blocking(read_end, False)
        while True:
            alive = child.poll() is None
            try:
                chunk = os.read(read_end, 65536)
            except BlockingIOError:
                chunk = b""
            buffer += chunk
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                try:
                    update = json.loads(line)
                    message = str(update["message"])
                    done, total = int(update["done"]), int(update["total"])
                except (ValueError, KeyError, TypeError):
                    continue
            if self.listener is not None:
                self.listener(name, message, done, total, _resident_bytes(child.pid))
            if not alive:
                break
            time.sleep(0.1)
        os.close(read_end)
