"""The local model: one thread that alone touches it, and a line of requests before it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import msgspec

from edge_runtime.bundle import Bundle
from edge_runtime.confidence import confidence_of, gives_confidence
from edge_runtime.contract.errors import InferenceError, NearfarError
from edge_runtime.contract.manifest import Variant, require_preprocess
from edge_runtime.contract.pipeline import Prepared, finish, prepare_image, prepare_seed
from edge_runtime.contract.tasks import GenerationTask
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.contract.tensors import canonical
from edge_runtime.estimators import LocalEstimator
from edge_runtime.local_queue import Held, LocalQueue, Ticket
from edge_runtime.memory import Memory
from edge_runtime.photo import Photo
from edge_runtime.policies.base import LocalOutlook
from edge_runtime.results import Measured, VariantStatus
from edge_runtime.runtimes.base import LoadedModel
from edge_runtime.seed import Seed

__all__ = ["LocalAnswer", "LocalModel", "LocalPipeline", "Selection"]


class LocalPipeline:
    """Decode, pre-process, run, post-process. Not thread-safe: one caller at a time."""

    def __init__(self, model: LoadedModel, variant: Variant, bundle: Bundle) -> None:
        self.variant = variant
        self._model = model
        self._task = bundle.manifest.task
        self._labels = bundle.labels
        self._anchors = bundle.anchors
        self.generates = isinstance(self._task, GenerationTask)
        """Whether it takes a seed and not a photo."""
        self.scored = gives_confidence(self._task, variant.outputs)
        """Whether its answers say how sure they are."""

    def answer(self, asked: Photo | Seed, top_k: int | None = None) -> tuple[Answer, float | None]:
        """The answer and its confidence, if it has one.

        Raises ``ImageError``, ``InferenceError`` or ``TensorError``.
        """
        try:
            prepared = self._prepare(asked)
            raw = self._model.run([prepared.array])
            outputs = [
                canonical(output, spec)
                for output, spec in zip(raw, self.variant.outputs, strict=True)
            ]
            answer = finish(
                self._task,
                outputs,
                prepared,
                labels=self._labels,
                anchors=self._anchors,
                top_k=top_k,
            )
            return answer, confidence_of(self._task, outputs, answer)
        except NearfarError:
            raise
        except Exception as error:  # a backend's own exception
            raise InferenceError(
                f"{self.variant.id} failed ({type(error).__name__}: {error}): "
                "choose another variant"
            ) from error

    def _prepare(self, asked: Photo | Seed) -> Prepared:
        spec = self._model.inputs[0]
        if isinstance(asked, Seed):
            return prepare_seed(spec, asked.value)
        return prepare_image(require_preprocess(self.variant.preprocess), spec, asked.pixels())

    def close(self) -> None:
        """Free the model."""
        self._model.close()


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """The variant that was chosen, loaded and timed; see ``variants.py``."""

    pipeline: LocalPipeline
    reason: str
    measured: tuple[Measured, ...]
    latencies_ms: tuple[float, ...]


class LocalAnswer(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What the local model said, how sure it is, and how long it took."""

    answer: Answer
    confidence: float | None
    wait_ms: float
    run_ms: float


_FAST = 0.25
"""Quantile of the latency that must fit for a run to begin."""
_LONG = 0.95
"""Quantile of the latency for which a run may keep others waiting."""


class LocalModel:
    """The model and the thread in which it is loaded and run, earliest deadline first."""

    def __init__(
        self, select: Callable[[], Selection], *, memory: Memory | None = None, threads: int = 1
    ) -> None:
        self._memory, self._threads = memory, threads
        self._queue = LocalQueue("nearfar-local", self._long_ms)
        try:
            self._selection = self._queue.submit(select).future.result()
        except BaseException:
            self._queue.close(lambda: None)
            raise
        known: tuple[float, ...] = ()
        if memory is not None:
            known = memory.recall_latencies(self.variant.sha256, threads)
        # What was measured just now is the latest.
        self._estimator = LocalEstimator.of((*known, *self._selection.latencies_ms))

    @property
    def variant(self) -> Variant:
        """The variant that runs."""
        return self._selection.pipeline.variant

    @property
    def scored(self) -> bool:
        """Whether its answers say how sure they are."""
        return self._selection.pipeline.scored

    def outlook(
        self,
        deadline_s: float = float("inf"),
        ticket: Ticket[LocalAnswer] | None = None,
        owner: int = 0,
    ) -> LocalOutlook:
        """Latency quantiles, and the wait: of a new request, or until ``ticket`` ends.

        ``owner``: what that request itself holds back is not counted.
        """
        p50_ms = self._estimator.quantile_ms(0.5)
        waiting, running_s = self._queue.ahead(ticket, deadline_s)
        wait_ms = 0.0 if running_s is None else max(p50_ms - running_s * 1e3, 0.1 * p50_ms)
        left_ms = None
        if ticket is not None and not ticket.future.done():
            own = ticket.future.running()
            left_ms = wait_ms if own else wait_ms + (waiting + 1) * p50_ms
        return LocalOutlook(
            p50_ms=p50_ms,
            p95_ms=self._estimator.quantile_ms(_LONG),
            queue_wait_ms=wait_ms + waiting * p50_ms,
            left_ms=left_ms,
            reserved_ms=self._queue.reserved_ms(owner, deadline_s),
        )

    def hold(
        self, owner: int, start_s: float, deadline_s: float, begin: Callable[[], None]
    ) -> None:
        """A request holds its run back until ``start_s``.

        ``begin`` is called, in the model's thread, when another run would lock it out.
        """
        self._queue.hold(owner, Held(start_s, deadline_s, begin))

    def release(self, owner: int) -> None:
        """That request's run was submitted, or is not needed."""
        self._queue.release(owner)

    def status(self) -> VariantStatus:
        """The same for people."""
        outlook = self.outlook()
        variant = self.variant
        return VariantStatus(
            variant=variant.id,
            format=variant.format,
            precision=variant.precision,
            reason=self._selection.reason,
            measured=self._selection.measured,
            p50_ms=outlook.p50_ms,
            p95_ms=outlook.p95_ms,
            pending=self._queue.pending,
        )

    def submit(
        self, asked: Photo | Seed, top_k: int | None, deadline_s: float, *, expires: bool = False
    ) -> Ticket[LocalAnswer]:
        """Put one image or seed in line; its future can be cancelled until its turn comes.

        It raises ``ImageError``, or what the runtime raises; with ``expires`` it raises
        ``DeadlineExceeded`` when its turn comes too late.
        """
        try:
            return self._queue.submit(
                partial(self._run, asked, top_k, time.monotonic()),
                deadline_s,
                least_ms=self._fast_ms if expires else None,
            )
        except RuntimeError:  # shut down meanwhile
            raise InferenceError("this EdgeRuntime is closed: make a new one") from None

    def _fast_ms(self) -> float:
        return self._estimator.quantile_ms(_FAST)

    def _long_ms(self) -> float:
        return self._estimator.quantile_ms(_LONG)

    def _run(self, asked: Photo | Seed, top_k: int | None, submitted: float) -> LocalAnswer:
        started = time.monotonic()
        answer, confidence = self._selection.pipeline.answer(asked, top_k)
        run_ms = (time.monotonic() - started) * 1e3
        self._estimator = self._estimator.observe(run_ms)
        return LocalAnswer(
            answer=answer,
            confidence=confidence,
            wait_ms=(started - submitted) * 1e3,
            run_ms=run_ms,
        )

    def keep(self) -> None:
        """Put the last latencies into the memory."""
        if self._memory is not None:
            latencies_ms = self._estimator.latencies_ms
            self._memory.ran(self.variant.sha256, self._threads, latencies_ms)

    def close(self) -> None:
        """Answer those in line, free the model, end the thread."""
        self._queue.close(self._selection.pipeline.close)
