"""Start child processes for jobs, watch them, and turn what happens into typed results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from converters.jobs import Job, JobResult
from converters.resume import JobCache
from edge_runtime.contract.errors import ConversionError, NearfarError, error_from_code

__all__ = ["JobError", "Listener", "Supervisor"]

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
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0
    return 0


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
        self._children: set[subprocess.Popen[bytes]] = set()
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
        job_path = folder / f"{name}.json"
        result_path = folder / f"{name}.result.json"
        log_path = folder / f"{name}.log"
        job_path.write_bytes(msgspec.json.encode(job))
        result_path.unlink(missing_ok=True)
        read_end, write_end = os.pipe()
        start = time.monotonic()
        try:
            with log_path.open("wb") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", "converters.worker", str(job_path), str(result_path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment(write_end),
                    pass_fds=(write_end,),
                    cwd=folder,
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
            child.wait(timeout=self.timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            raise self._error(
                name, f"no result after {self.timeout_s:.0f} s", log_path, JobResult()
            ) from None
        finally:
            watcher.join(timeout=5.0)
            with self._lock:
                self._children.discard(child)
        return self._collect(name, child.returncode, result_path, log_path, start)

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

    def _environment(self, progress_fd: int) -> dict[str, str]:
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        flatc = Path(sys.prefix) / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"
        return {
            **os.environ,
            "NEARFAR_PROGRESS_FD": str(progress_fd),
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

    def _watch(self, name: str, child: subprocess.Popen[bytes], read_end: int) -> None:
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
