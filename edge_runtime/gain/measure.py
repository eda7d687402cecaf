"""Ask both sides about every image: the local file here, the cloud model at its broker."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundle import Bundle
from edge_runtime.confidence import confidence_of
from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    BrokerFault,
    EvaluationError,
    ImageError,
    LimitExceeded,
    MissingFile,
    NearfarError,
)
from edge_runtime.contract.files import read_bounded
from edge_runtime.contract.imaging import decode_image
from edge_runtime.contract.manifest import Variant, require_preprocess
from edge_runtime.contract.pipeline import finish, prepare_image
from edge_runtime.contract.tasks import ClassificationTask
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.contract.tensors import canonical
from edge_runtime.contract.wire import ModelRef
from edge_runtime.gain.agreement import agreement
from edge_runtime.gain.data import Photos
from edge_runtime.gain.samples import Samples
from edge_runtime.results import Result
from edge_runtime.runtime import EdgeRuntime
from edge_runtime.runtimes.base import find_runtime

__all__ = ["MIN_IMAGES", "LocalSide", "Measurement", "measure"]

MIN_IMAGES: Final = 40
_CONCURRENCY: Final = 4
_ATTEMPTS: Final = 4
_PAUSE_S: Final = 0.5
_SMALLEST: Final = 1e-12


@dataclass(frozen=True, kw_only=True)
class LocalSaid:
    """One local answer with what it was made from."""

    answer: Answer
    confidence: float | None
    logits: NDArray[np.float32] | None
    """``[C]``; see ``Samples.logits``."""


class LocalSide:
    """A variant, run without any deadline. Use it in the thread that made it; close it."""

    def __init__(self, bundle: Bundle, variant: Variant, *, threads: int = 1) -> None:
        self._bundle = bundle
        self._variant = variant
        runtime = find_runtime(variant.format)
        self._model = runtime.load(bundle.path(variant), variant, threads=threads)

    def answer(self, encoded: bytes) -> LocalSaid:
        """As the runtime answers it. Raises ``ImageError``, or what the interpreter raises."""
        bundle, variant = self._bundle, self._variant
        task = bundle.manifest.task
        pixels = decode_image(encoded)
        record = require_preprocess(variant.preprocess)
        prepared = prepare_image(record, self._model.inputs[0], pixels)
        raw = self._model.run([prepared.array])
        outputs = [
            canonical(output, spec) for output, spec in zip(raw, variant.outputs, strict=True)
        ]
        answer = finish(
            task, outputs, prepared, labels=bundle.labels, anchors=bundle.anchors, top_k=None
        )
        logits = None
        if isinstance(task, ClassificationTask) and task.activation != "sigmoid":
            logits = np.asarray(outputs[0], dtype=np.float32).reshape(-1)
            if task.activation == "none":
                logits = np.log(np.maximum(logits, np.float32(_SMALLEST)))
            else:
                logits = logits / np.float32(task.temperature)
        return LocalSaid(
            answer=answer, confidence=confidence_of(task, outputs, answer), logits=logits
        )

    def close(self) -> None:
        """Free the model."""
        self._model.close()


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What both sides said, and which cloud model it was."""

    samples: Samples
    cloud: ModelRef
    skipped: int
    classes: tuple[int, ...] | None
    """Of the samples, in their order."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    digest: str
    truth: int | None
    local: LocalSaid
    cloud_class: int | None
    agreement: float


def measure(
    local: LocalSide,
    cloud: EdgeRuntime,
    photos: Photos,
    *,
    deadline_ms: float,
    progress: Callable[[int], None],
) -> Measurement:
    """Both answers to every photo. ``cloud``: a runtime that only asks its broker.

    An image that neither side can read is skipped and counted; one that comes twice counts
    once. ``progress`` gets the number of images done.

    Raises ``RemoteError`` when the broker stays away, ``BrokerFault`` when its model changes
    meanwhile, ``EvaluationError`` when fewer than ``MIN_IMAGES`` are left.
    """
    asked: deque[tuple[bytes, int | None]] = deque()
    counts = {"skipped": 0, "done": 0}

    def bodies() -> Iterator[bytes]:
        for number, path in enumerate(photos.files):
            try:
                data = read_bounded(path, limits.MAX_IMAGE_BYTES)
            except (LimitExceeded, MissingFile):
                counts["skipped"] += 1
                continue
            asked.append((data, None if photos.classes is None else photos.classes[number]))
            yield data

    rows: dict[str, _Row] = {}
    reference: ModelRef | None = None
    answers = cloud.run_many(bodies(), deadline_ms=deadline_ms, concurrency=_CONCURRENCY)
    for said in answers:
        data, truth = asked.popleft()
        counts["done"] += 1
        progress(counts["done"] + counts["skipped"])
        try:
            result = _persist(cloud, data, deadline_ms, said)
            row = _row(local, data, truth, result)
        except ImageError:
            counts["skipped"] += 1
            counts["done"] -= 1
            continue
        assert isinstance(result.model, ModelRef)  # noqa: S101  # the cloud answered
        if reference is not None and result.model.sha256 != reference.sha256:
            raise BrokerFault("the broker changed its model meanwhile: calibrate again")
        reference = result.model
        rows[row.digest] = row
    if reference is None or len(rows) < MIN_IMAGES:
        raise EvaluationError(
            f"{len(rows)} different images were answered, at least {MIN_IMAGES} are needed "
            f"({counts['skipped']} could not be read): name a folder with more"
        )
    ordered = [rows[digest] for digest in sorted(rows)]
    return Measurement(
        samples=_samples(ordered),
        cloud=reference,
        skipped=counts["skipped"],
        classes=None if photos.classes is None else tuple(int(row.truth or 0) for row in ordered),
    )


def _persist(
    cloud: EdgeRuntime, data: bytes, deadline_ms: float, said: Result | NearfarError
) -> Result:
    """The cloud's answer, asked again where it may come later; raises the first error.

    The later ones may only say that the broker is left alone because of it.
    """
    first = said
    for attempt in range(_ATTEMPTS):
        if isinstance(said, Result):
            return said
        if not said.retryable or attempt == _ATTEMPTS - 1:
            break
        time.sleep(_PAUSE_S * 2**attempt)
        try:
            said = cloud.run(data, deadline_ms=deadline_ms)
        except NearfarError as error:
            said = error
    assert isinstance(first, NearfarError)  # noqa: S101  # a result was returned above
    raise first


def _row(local: LocalSide, data: bytes, truth: int | None, result: Result) -> _Row:
    own = local.answer(data)
    other = Answer(
        predictions=result.predictions or None,
        boxes=result.boxes if result.task == "detection" else None,
        class_map=result.class_map,
        region=result.region,
    )
    return _Row(
        digest=hashlib.sha256(data).hexdigest(),
        truth=truth,
        local=own,
        cloud_class=result.predictions[0].index if result.predictions else None,
        agreement=agreement(own.answer, other),
    )


def _samples(rows: list[_Row]) -> Samples:
    labeled = all(row.truth is not None and row.cloud_class is not None for row in rows)
    scored = all(row.local.confidence is not None for row in rows)
    logits = [row.local.logits for row in rows]
    local_class = [
        row.local.answer.predictions[0].index if row.local.answer.predictions else -1
        for row in rows
    ]
    truth = np.array([row.truth for row in rows], dtype=np.int64) if labeled else None
    return Samples(
        digests=tuple(row.digest for row in rows),
        agreement=np.array([row.agreement for row in rows], dtype=np.float64),
        confidence=np.array([row.local.confidence for row in rows], dtype=np.float64)
        if scored
        else None,
        truth=truth,
        local_right=None if truth is None else (np.array(local_class) == truth).astype(np.float64),
        cloud_right=None
        if truth is None
        else (np.array([row.cloud_class for row in rows]) == truth).astype(np.float64),
        logits=np.stack([one for one in logits if one is not None])
        if all(one is not None for one in logits)
        else None,
    )
