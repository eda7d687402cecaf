"""One job, one process: ``python -m converters.worker JOB.json RESULT.json``.

No process imports two converter stacks, whose import orders crash; a crash or an endless
loop here costs one variant, never the command. Progress goes to the file descriptor in
``NEARFAR_PROGRESS_FD`` as JSON lines; stdout and stderr belong to the libraries' noise.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

import msgspec

from converters.jobs import (
    Answer,
    ConvertJob,
    Job,
    JobResult,
    LayersJob,
    PrepareJob,
    RoundJob,
    RunJob,
    SamplesJob,
    SensitivityJob,
)
from edge_runtime.contract.errors import ConversionError, NearfarError

__all__ = ["main", "report_progress", "work"]


def report_progress(message: str, done: int = 0, total: int = 0) -> None:
    """Tell the parent what goes on; ends the process when the parent is gone."""
    descriptor = os.environ.get("NEARFAR_PROGRESS_FD")
    if descriptor is None:
        return
    line = json.dumps({"message": message, "done": done, "total": total}) + "\n"
    try:
        os.write(int(descriptor), line.encode())
    except BrokenPipeError:  # killed, so it could not stop us: nobody waits for the result
        os._exit(1)
    except OSError:
        return


def _run(job: Job) -> Answer:
    if isinstance(job, PrepareJob):
        from converters.prepare import prepare

        return prepare(job)
    if isinstance(job, RoundJob):
        from converters.prepare import round_for_int8

        return round_for_int8(job)
    if isinstance(job, SensitivityJob):
        from converters.prepare import order_layers

        return order_layers(job)
    if isinstance(job, ConvertJob):
        from converters.formats.base import find_backend

        return find_backend(job.format).convert(job)
    if isinstance(job, LayersJob):
        from converters.verify.layers import compare_layers

        return compare_layers(job)
    if isinstance(job, SamplesJob):
        from converters.verify.samples import render_samples

        return render_samples(job)
    assert isinstance(job, RunJob)  # noqa: S101
    from converters.verify.run_files import run_files

    return run_files(job)


def work(job_path: Path, result_path: Path) -> NoReturn:
    """Run the job and end the process; always write a result file, also for an error."""
    warnings.simplefilter("ignore")
    tempfile.tempdir = None  # read TMPDIR again: the process that was forked may have had another
    start = time.monotonic()
    result = JobResult()
    try:
        job = msgspec.json.decode(job_path.read_bytes(), type=Job)
        result.answer = _run(job)
    except NearfarError as error:
        result.error_code, result.error_detail = error.code, error.detail
        traceback.print_exc()
    except MemoryError:
        result.error_code = ConversionError.code
        result.error_detail = "the child process ran out of memory: use a machine with more"
    except Exception as error:
        traceback.print_exc()
        result.error_code = ConversionError.code
        reason = str(error).strip().split("\n", 1)[0][:300]
        result.error_detail = f"{type(error).__name__}: {reason}"
    result.seconds = time.monotonic() - start
    result.peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    temporary = result_path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.encode(result))
    temporary.replace(result_path)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # some native libraries crash while they are torn down


def main() -> NoReturn:
    """``python -m converters.worker JOB.json RESULT.json``."""
    work(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
