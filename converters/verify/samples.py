"""Child process: each file's answers for a few inputs, as pictures for the HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.jobs import SamplesJob, SamplesResult, VariantRun
from converters.report.records import RenderedAnswer
from converters.report.samples import render_input, render_sample
from converters.verify.run_files import Inputs, canonical_outputs, read_anchors, saved_answers
from converters.worker import report_progress
from edge_runtime.contract.errors import NearfarError
from edge_runtime.runtimes.base import find_runtime

__all__ = ["render_samples"]


def render_samples(job: SamplesJob) -> SamplesResult:
    """Answers of every variant of one format for the chosen inputs."""
    import torch

    torch.set_num_threads(1)
    inputs = Inputs(job.images, job.latents)
    anchors = read_anchors(job.anchors)
    pixels: list[NDArray[np.uint8] | None] = [None] * len(job.rows)
    if job.preprocess is not None:
        pixels = list(inputs.pixels(job.preprocess))
    reference = [
        [np.array(one[row : row + 1]) for one in saved_answers(Path(job.out_dir))]
        for row in job.rows
    ]
    labels = tuple(job.labels)
    result = SamplesResult()
    for exact, shown in zip(reference, pixels, strict=True):
        result.inputs.append(render_input(shown, job.preprocess) if shown is not None else None)
        result.references.append(
            render_sample(job.task, labels, shown, exact, anchors, record=job.preprocess)
        )
    for item in job.variants:
        report_progress(f"samples of {item.variant.id}")
        try:
            answers = _answers(item, inputs, job.rows)
        except NearfarError as error:
            failed = RenderedAnswer(error=error.detail, differs=True)
            result.answers[item.variant.id] = [failed] * len(job.rows)
            continue
        result.answers[item.variant.id] = [
            render_sample(
                job.task, labels, shown, own, anchors, reference=exact, record=job.preprocess
            )
            for own, exact, shown in zip(answers, reference, pixels, strict=True)
        ]
    return result


def _answers(item: VariantRun, inputs: Inputs, rows: list[int]) -> list[list[NDArray[Any]]]:
    variant = item.variant
    model = find_runtime(variant.format).load(Path(item.path), variant)
    found = []
    for number, batch in enumerate(inputs.fed(variant.preprocess, variant.inputs[0])):
        if variant.preprocess is None and number not in rows:
            continue  # latents are numbered by their seed; images were chosen before
        found.append(canonical_outputs(model, model.run([batch])))
    model.close()
    return found
