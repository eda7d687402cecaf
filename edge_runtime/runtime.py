"""``EdgeRuntime``: the one object an app holds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import threading
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from edge_runtime.bundle import Bundle
from edge_runtime.calibrated import Calibrated
from edge_runtime.conditions import ConditionsSource, UnknownConditions, read_conditions
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError, NearfarError
from edge_runtime.contract.tasks import GenerationTask
from edge_runtime.engine import (
    Engine,
    choose_policy,
    close_parts,
    connect,
    load_local,
    open_log,
    open_transports,
)
from edge_runtime.gain import GainLookup
from edge_runtime.history import History
from edge_runtime.jobs.book import JobBook
from edge_runtime.later import Later, check_top_k
from edge_runtime.log.recorder import LogSink, Recorder
from edge_runtime.many import answer_many, answer_many_async, check_concurrency
from edge_runtime.memory import Memory
from edge_runtime.observe import prometheus_text
from edge_runtime.offload.transport import Transport
from edge_runtime.photo import ImageInput, Photo
from edge_runtime.policies.base import Budgets, InferenceMode, Policy, Prices
from edge_runtime.punctuality import Punctuality
from edge_runtime.request import Request
from edge_runtime.results import Counts, InferenceSource, Result, Status
from edge_runtime.seed import Seed
from edge_runtime.state import FolderClaim
from edge_runtime.waiting import wait, wait_async

__all__ = ["EdgeRuntime"]


class EdgeRuntime(Later):
    """Answers images, or seeds, with a bundle: on the device, or in the cloud when that pays.

    Making one opens and verifies the bundle, loads a variant and times it (about a second;
    in a running event loop, make it with ``await asyncio.to_thread(EdgeRuntime, ...)``).
    All methods may be called from any thread. Close it, or use it in a ``with`` or
    ``async with`` block: afterwards no thread, task or socket is left.

        with EdgeRuntime("digits.bundle", broker="https://broker.example") as runtime:
            result = runtime.run("photo.jpg", deadline_ms=400)
            print(result.label, result.score, result.inference_source)

    Args:
        bundle: a path, or an open ``Bundle``.
        broker: URL of the broker; None: everything stays on the device. Several: each request
            goes to the better of two of them, and on to another one when that fails.
        policy: an ``InferenceMode``, the name of a registered policy, or a ``Policy``.
        variant: ``auto`` (the best one whose measured 95th percentile fits half the
            deadline, else the fastest), a variant's id, or ``FORMAT-PRECISION``.
        cloud_model: the broker's model to ask; None: the only one with this bundle's task and
            labels.
        api_key: sent to the broker as a bearer token.
        deadline_ms: for calls that name none.
        threads: for the local interpreter.
        prices: what an upload must bring to be worth it.
        budgets: limits that no gain outweighs: bytes on a metered link, battery, heat, price.
        conditions: supplies the device's signals: ``LinuxSignals``, ``SettableSignals``, or the
            app's own ``PlatformSignals``.
        jpeg_answers: let the cloud send an answer that is an image as a JPEG: about a tenth
            of the bytes, not exact.
        tls: for a broker with a private CA; certificates are verified either way.
        allow_plain_http: send the key over ``http://`` to a host that is not this one.
        session: send images over one WebSocket where the broker has it (``docs/session.md``):
            an upload can be cancelled, and refused before it begins. False: POST only.
        transport: instead of ``broker``: carries the requests (``edge_runtime.testing``).
        state: a folder for what shall outlive the process: jobs (``submit``), and what was
            learned of networks and of this device. Readable by its owner alone; one runtime
            at a time. None: nothing is stored.
        log: a file for the decision log (``docs/decision-log.md``), a ``DecisionLog``, or a
            function that takes each request's ``LogEntry``.

    Raises:
        TrustError, ManifestError: the bundle is not what its manifest says.
        ConfigError: an argument makes no sense.
        BackendUnavailable: the interpreter to install.
        ModelLoadError: the variant does not load.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle,
        broker: str | Sequence[str] | None = None,
        policy: str | Policy = InferenceMode.ADAPTIVE,
        variant: str = "auto",
        *,
        cloud_model: str | None = None,
        api_key: str | None = None,
        deadline_ms: float = limits.DEFAULT_DEADLINE_MS,
        threads: int = 1,
        prices: Prices | None = None,
        budgets: Budgets | None = None,
        conditions: ConditionsSource | None = None,
        jpeg_answers: bool = False,
        tls: ssl.SSLContext | None = None,
        allow_plain_http: bool = False,
        session: bool = True,
        transport: Transport | Sequence[Transport] | None = None,
        state: str | os.PathLike[str] | None = None,
        log: str | os.PathLike[str] | LogSink | None = None,
    ) -> None:
        self._deadline_ms = _check_deadline_ms(deadline_ms)
        if not 1 <= threads <= 256:
            raise ConfigError(f"threads must be 1 to 256, not {threads}")
        transports = open_transports(
            broker,
            transport,
            api_key=api_key,
            tls=tls,
            allow_plain_http=allow_plain_http,
            session=session,
        )
        chosen = choose_policy(policy, connected=bool(transports))
        if not chosen.uses_cloud:
            transports = {}
        self._bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
        task = self._bundle.manifest.task
        claim = None if state is None else FolderClaim(Path(state))
        with contextlib.ExitStack() as undo:
            if claim is not None:
                undo.callback(claim.close)
            memory = None if state is None else Memory(Path(state))
            sink, own_log = open_log(log)
            local, local_error = None, None
            if chosen.uses_local:
                local, local_error = load_local(
                    self._bundle,
                    variant,
                    fits_ms=self._deadline_ms / 2,
                    threads=threads,
                    connected=bool(transports),
                    memory=memory,
                )
            source = conditions or UnknownConditions()
            uplink = None
            if transports:
                uplink = connect(
                    transports,
                    self._bundle,
                    cloud_model=cloud_model,
                    image_type="image/jpeg" if jpeg_answers else "image/png",
                    api_key=api_key,
                    source=source,
                    memory=memory,
                    early=chosen.prewarms or local is None,
                )
            self._engine = Engine(
                task=task,
                policies=Calibrated(
                    chosen,
                    None if local is None else GainLookup(self._bundle, local.variant.sha256),
                ),
                local=local,
                local_error=local_error,
                uplink=uplink,
                conditions=source,
                prices=prices or Prices(),
                history=History(budgets or Budgets()),
                punctuality=Punctuality(),
                recorder=None
                if sink is None
                else Recorder(
                    sink,
                    task=task,
                    bundle=f"{self._bundle.manifest.name}@{self._bundle.manifest.version}",
                    variant=None if local is None else local.variant.id,
                ),
            )
            self._jobs = JobBook(
                self._engine,
                self._bundle.manifest.name,
                None if state is None else Path(state) / "jobs",
            )
            self._uplink = uplink
            self._jobs.resume_deferred()
            self._lock = threading.Lock()
            self._counts = Counts()
            # Also runs when the object is dropped, and when the program ends.
            self._finalizer = weakref.finalize(
                self, close_parts, local, uplink, own_log, self._jobs.close, memory, claim
            )
            undo.pop_all()

    # Answers --------------------------------------------------------------------------

    def run(
        self,
        image: ImageInput,
        *,
        deadline_ms: float | None = None,
        top_k: int | None = None,
        private: bool = False,
    ) -> Result:
        """Answer one image; blocks until the answer is there.

        With a local model, the answer comes within the deadline whenever the local model
        keeps it, whatever the network does; a slower local model's answer comes when it is
        ready, with ``deadline_met`` false.

        Args:
            image: encoded JPEG, PNG or WebP bytes, a path, or uint8 RGB ``[H, W, 3]``
                (encoded as JPEG of quality 90 if it must be uploaded). An array must not
                be changed before the answer is there.
            deadline_ms: from now; None: the runtime's.
            top_k: at most so many predictions or boxes; None: the bundle's number.
            private: this image never leaves the device.

        Raises:
            ImageError, TensorError: the image cannot be used.
            RemoteError, WireError, LabelsMismatch: only without a local answer.
            RuntimeFault: the local model failed and no cloud answered instead.
            ConfigError: an argument makes no sense, the bundle takes seeds, or the runtime
                is closed.
        """
        started_s = time.monotonic()
        return self._wait(self._begin(image, started_s, deadline_ms, top_k, private))

    def generate(self, seed: int, *, deadline_ms: float | None = None) -> Result:
        """Make the image of one seed, with a bundle that generates; blocks as ``run`` does.

        One seed is one latent, on every device and in the cloud.

        Args:
            seed: 0 to 2^53 - 1.
            deadline_ms: from now; None: the runtime's.

        Raises:
            ConfigError: an argument makes no sense, the bundle takes images, or the runtime
                is closed.
            RemoteError, WireError: only without a local answer.
            RuntimeFault: the local model failed and no cloud answered instead.
        """
        started_s = time.monotonic()
        return self._wait(self._begin_seed(seed, started_s, deadline_ms))

    async def arun(
        self,
        image: ImageInput,
        *,
        deadline_ms: float | None = None,
        top_k: int | None = None,
        private: bool = False,
    ) -> Result:
        """``run`` for event loops; cancelling it cancels what is under way."""
        started_s = time.monotonic()
        if isinstance(image, bytes | bytearray | memoryview):
            request = self._begin(image, started_s, deadline_ms, top_k, private)
        else:  # reads a file, or may encode pixels
            beginning = asyncio.ensure_future(
                asyncio.to_thread(self._begin, image, started_s, deadline_ms, top_k, private)
            )
            try:
                request = await asyncio.shield(beginning)
            except asyncio.CancelledError:
                beginning.add_done_callback(_abandon)
                raise
        return await self._wait_async(request)

    def run_many(
        self,
        images: Iterable[ImageInput],
        *,
        deadline_ms: float | None = None,
        top_k: int | None = None,
        private: bool = False,
        concurrency: int = 4,
    ) -> Generator[Result | NearfarError, None, None]:
        """Answer many images, in their order: a result each, or its error as a value.

        At most ``concurrency`` (1 to 64) are under way at a time, and ``images`` is read no
        further ahead. Each deadline counts from the moment its image is taken; the local
        model answers one at a time, so with a short deadline and a slow model fewer are
        better. Closing the iterator ends what is under way. Raises ``ConfigError`` at once
        when an argument makes no sense.
        """
        check_concurrency(concurrency)
        self._deadline(deadline_ms)
        return answer_many(
            images,
            lambda image: self._begin(image, time.monotonic(), deadline_ms, top_k, private),
            self._wait,
            concurrency,
        )

    def arun_many(
        self,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        *,
        deadline_ms: float | None = None,
        top_k: int | None = None,
        private: bool = False,
        concurrency: int = 4,
    ) -> AsyncGenerator[Result | NearfarError, None]:
        """``run_many`` for event loops; ``images`` may be asynchronous too."""
        check_concurrency(concurrency)
        self._deadline(deadline_ms)
        return answer_many_async(
            images,
            lambda image: self.arun(image, deadline_ms=deadline_ms, top_k=top_k, private=private),
            concurrency,
        )

    async def agenerate(self, seed: int, *, deadline_ms: float | None = None) -> Result:
        """``generate`` for event loops; cancelling it cancels what is under way."""
        started_s = time.monotonic()
        return await self._wait_async(self._begin_seed(seed, started_s, deadline_ms))

    def _wait(self, request: Request) -> Result:
        try:
            return self._count(wait(request))
        except BaseException as error:
            self._count_failure(error)
            raise

    async def _wait_async(self, request: Request) -> Result:
        try:
            return self._count(await wait_async(request))
        except BaseException as error:
            self._count_failure(error)
            raise

    def _begin(
        self,
        image: ImageInput,
        started_s: float,
        deadline_ms: float | None,
        top_k: int | None,
        private: bool,
    ) -> Request:
        task = self._engine.task
        self._require_open()
        if isinstance(task, GenerationTask):
            raise ConfigError("this bundle generates images from seeds: call generate(seed)")
        top_k = check_top_k(task, top_k)
        policy = self._engine.policy
        if private and not policy.uses_local:
            raise ConfigError(
                f"a private image never leaves the device, and {policy.name} never answers "
                "there: use another policy for it"
            )
        return self._start(
            Photo.read(image), started_s, self._deadline(deadline_ms), top_k, private=private
        )

    def _begin_seed(self, seed: int, started_s: float, deadline_ms: float | None) -> Request:
        self._require_open()
        if not isinstance(self._engine.task, GenerationTask):
            raise ConfigError("this bundle takes images: call run(image)")
        return self._start(Seed.read(seed), started_s, self._deadline(deadline_ms), None)

    def _require_open(self) -> None:
        if self._finalizer.alive is False:
            raise ConfigError("this EdgeRuntime is closed: make a new one")

    def _deadline(self, deadline_ms: float | None) -> float:
        return self._deadline_ms if deadline_ms is None else _check_deadline_ms(deadline_ms)

    def _start(
        self,
        asked: Photo | Seed,
        started_s: float,
        deadline_ms: float,
        top_k: int | None,
        *,
        private: bool = False,
    ) -> Request:
        request = Request(
            self._engine,
            asked,
            started_s=started_s,
            deadline_ms=deadline_ms,
            top_k=top_k,
            private=private,
        )
        request.start()
        return request

    def _count(self, result: Result) -> Result:
        local = result.inference_source is InferenceSource.ON_DEVICE
        with self._lock:
            counts = self._counts
            self._counts = msgspec.structs.replace(
                counts,
                requests=counts.requests + 1,
                on_device=counts.on_device + local,
                in_cloud=counts.in_cloud + (not local),
                deadline_missed=counts.deadline_missed + (not result.deadline_met),
            )
        return result

    def _count_failure(self, error: BaseException) -> None:
        if not isinstance(error, NearfarError):
            return  # cancelled or interrupted by the caller
        with self._lock:
            counts = self._counts
            self._counts = msgspec.structs.replace(
                counts, requests=counts.requests + 1, failed=counts.failed + 1
            )

    # The rest -------------------------------------------------------------------------

    def prewarm(self, *, wait_ms: float = 0.0) -> bool:
        """Open the connection to the broker now: call it when a request is likely soon.

        Returns whether an upload could start at once; without ``wait_ms`` the opening goes
        on in the background. False also without a broker. Never raises for the network.
        """
        uplink = self._uplink
        if uplink is None or self._finalizer.alive is False:
            return False
        future = uplink.prewarm(forced=True)
        try:
            return future.result(max(0.0, wait_ms) / 1e3)
        except (FutureTimeout, CancelledError):
            return False

    def status(self) -> Status:
        """A snapshot: the variant and why, latencies, link, broker, breaker, counts."""
        engine = self._engine
        uplink = self._uplink
        with self._lock:
            counts = self._counts
        if uplink is not None:
            counts = msgspec.structs.replace(
                counts, uploads=uplink.uploads, uploaded_bytes=uplink.uploaded_bytes
            )
        manifest = self._bundle.manifest
        error = engine.local_error
        return Status(
            bundle=f"{manifest.name}@{manifest.version}",
            policy=engine.policy.name,
            closed=not self._finalizer.alive,
            variant=None if engine.local is None else engine.local.status(),
            variant_error=None if error is None else error.detail,
            broker=None if uplink is None else uplink.status(),
            brokers=() if uplink is None else uplink.statuses(),
            conditions=read_conditions(engine.conditions),
            counts=counts,
        )

    def prometheus(self) -> str:
        """``status()`` in Prometheus' text format: counters, latencies, link, breaker."""
        return prometheus_text(self.status())

    def close(self) -> None:
        """End every thread, task and connection; calling it again does nothing.

        Calls of ``run`` that are under way in other threads end with their local answer
        if they have one coming, and with an error otherwise.
        """
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)


def _check_deadline_ms(deadline_ms: float) -> float:
    if not 1 <= deadline_ms <= limits.MAX_DEADLINE_MS:
        raise ConfigError(
            f"deadline_ms must be 1 to {limits.MAX_DEADLINE_MS}, not {deadline_ms}: "
            "it is the time until the answer is needed"
        )
    return float(deadline_ms)


def _abandon(beginning: asyncio.Future[Request]) -> None:
    """The caller was cancelled while a thread was still reading its file."""
    if not beginning.cancelled() and beginning.exception() is None:
        beginning.result().abandon()
