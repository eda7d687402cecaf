"""Which libraries a job needs before it starts: its stack.

Jobs of one stack are forked from one process that has imported them (``zygote.py``). A stack
never holds two converters, whose import orders crash.
"""

from __future__ import annotations

from typing import Final

from converters.jobs import ConvertJob, Job, RunJob, SamplesJob

__all__ = ["PRELOADED", "stack_of"]

_TORCH: Final = ("numpy", "PIL.Image", "torch", "torchvision", "torch.export", "torch.fx")

PRELOADED: Final[dict[str, tuple[str, ...]]] = {
    "torch": (
        *_TORCH,
        "torch.export.pt2_archive._package",  # what loading a program imports
        "converters.prepare",
        "converters.verify.run_files",
    ),
    "convert-tflite": (*_TORCH, "litert_torch", "ai_edge_litert.interpreter", "converters.prepare"),
    "convert-coreml": (*_TORCH, "coremltools", "converters.prepare"),
    "convert-executorch": (
        *_TORCH,
        "executorch.exir",
        "executorch.backends.xnnpack.partition.xnnpack_partitioner",
        "converters.prepare",
    ),
    "run-tflite": (
        "numpy",
        "PIL.Image",
        "ai_edge_litert.interpreter",
        "converters.verify.run_files",
    ),
    "run-executorch": (*_TORCH, "executorch.runtime", "converters.verify.run_files"),
}
"""Modules to import, in this order. One that is missing is the job's to complain about."""

_CONVERT: Final = {
    "torchscript": "torch",
    "tflite": "convert-tflite",
    "coreml": "convert-coreml",
    "executorch": "convert-executorch",
}
_RUN: Final = {
    "torchscript": "torch",
    "tflite": "run-tflite",
    "coreml": "torch",  # a Core ML program runs in torch here
    "executorch": "run-executorch",
}


def stack_of(job: Job) -> str | None:
    """The stack that ``job`` runs in; None: unknown, so it starts from nothing."""
    if isinstance(job, ConvertJob):
        return _CONVERT.get(job.format)
    if isinstance(job, RunJob | SamplesJob) and job.variants:
        return _RUN.get(job.variants[0].variant.format)
    return "torch"
