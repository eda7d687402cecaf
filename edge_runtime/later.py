"""What an app may ask of a runtime without waiting for it: jobs, now or later."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod

from edge_runtime.conditions import UnknownConditions
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.tasks import (
    ClassificationTask,
    DetectionTask,
    GenerationTask,
    Task,
    task_name,
)
from edge_runtime.engine import Engine
from edge_runtime.jobs.book import JobBook
from edge_runtime.jobs.job import AsyncJob, Job, JobCore
from edge_runtime.jobs.store import Deferral
from edge_runtime.photo import ImageInput, Photo
from edge_runtime.seed import Seed

__all__ = ["Later", "check_top_k", "read_asked"]

_MAX_TTL_S = 30 * 86_400.0


class Later(ABC):
    """The part of ``EdgeRuntime`` whose answers come later."""

    _engine: Engine
    _jobs: JobBook

    def submit(
        self, asked: ImageInput | int, *, top_k: int | None = None, private: bool = False
    ) -> Job:
        """Begin slow work and return at once: a job, to be waited for, followed or canceled.

        It runs on the device when the policy decides so (as for an image with the longest
        deadline there is), with ``ONLY_ON_DEVICE`` or when it is private; else it is a job of
        the broker (``docs/jobs.md``), which goes on while the device is off. With a state
        folder it is stored before this returns, and ``jobs()`` finds it again after a restart
        of the app; not a private one.

        Args:
            asked: an image as for ``run``, or a seed for a bundle that generates.
            top_k: at most so many predictions or boxes; None: the bundle's number.
            private: it never leaves the device, and is not stored.

        Raises:
            ImageError, TensorError: the image cannot be used.
            LimitExceeded: the state folder holds too many jobs.
            ConfigError: an argument makes no sense, there is nothing that could do it, the
                state folder cannot be written, or the runtime is closed.
        """
        return Job(self._submit(asked, top_k, private))

    async def asubmit(
        self, asked: ImageInput | int, *, top_k: int | None = None, private: bool = False
    ) -> AsyncJob:
        """``submit`` for event loops."""
        return AsyncJob(await asyncio.to_thread(self._submit, asked, top_k, private))

    def defer(
        self,
        asked: ImageInput | int,
        *,
        ttl_s: float = 86_400.0,
        unmetered: bool = True,
        charging: bool = False,
        top_k: int | None = None,
        private: bool = False,
    ) -> Job:
        """Have the cloud answer this some time, when it costs the user little.

        It is on the disk, without its metadata, when this returns, and is sent when its
        conditions hold: by this runtime, or after a restart by the next one with the same
        state folder. Its id is its idempotency key, so the broker runs it once whatever ends
        the app in between; its answer is on the disk before ``result()`` gives it, and stays
        until ``forget()``.

        Args:
            asked: an image as for ``run``, or a seed for a bundle that generates.
            ttl_s: if it was not sent within this time (at most 30 days), the job fails with
                ``DeadlineExceeded``.
            unmetered: only over a network that is not metered; Wi-Fi and Ethernet count as
                such where the platform does not say.
            charging: only while the device charges.
            top_k: at most so many predictions or boxes; None: the bundle's number.
            private: refused: what is private is never uploaded.

        Raises:
            ImageError, TensorError: the image cannot be used.
            LimitExceeded: the state folder holds too many jobs, or bytes.
            ConfigError: there is no state folder or broker, ``conditions`` cannot tell what
                is asked for, or an argument makes no sense.
        """
        return Job(self._defer(asked, ttl_s, unmetered, charging, top_k, private))

    async def adefer(
        self,
        asked: ImageInput | int,
        *,
        ttl_s: float = 86_400.0,
        unmetered: bool = True,
        charging: bool = False,
        top_k: int | None = None,
        private: bool = False,
    ) -> AsyncJob:
        """``defer`` for event loops."""
        core = await asyncio.to_thread(
            self._defer, asked, ttl_s, unmetered, charging, top_k, private
        )
        return AsyncJob(core)

    def _defer(
        self,
        asked: ImageInput | int,
        ttl_s: float,
        unmetered: bool,
        charging: bool,
        top_k: int | None,
        private: bool,
    ) -> JobCore:
        self._require_open()
        if private:
            raise ConfigError("a private image is never uploaded: do not defer it")
        if not self._jobs.lasting:
            raise ConfigError("what is deferred is kept on the disk: pass state=FOLDER")
        if self._engine.uplink is None:
            raise ConfigError("what is deferred is answered by a broker: pass broker=URL")
        if not 1 <= ttl_s <= _MAX_TTL_S:
            raise ConfigError(f"ttl_s must be 1 to {_MAX_TTL_S:.0f}, not {ttl_s}")
        if (unmetered or charging) and isinstance(self._engine.conditions, UnknownConditions):
            raise ConfigError(
                "nobody tells this runtime about network and charger: pass conditions=, or "
                "unmetered=False, charging=False"
            )
        task = self._engine.task
        deferral = Deferral(expires_s=time.time() + ttl_s, unmetered=unmetered, charging=charging)
        return self._jobs.defer(read_asked(task, asked), check_top_k(task, top_k), deferral)

    def jobs(self) -> list[Job]:
        """Every job of this runtime, oldest first, and those that its state folder holds.

        Those of an earlier process go on from here. A job leaves the list by ``forget()`` or
        ``cancel()``, and after seven days.
        """
        self._require_open()
        return [Job(core) for core in self._jobs.resume()]

    async def ajobs(self) -> list[AsyncJob]:
        """``jobs`` for event loops."""
        self._require_open()
        return [AsyncJob(core) for core in await asyncio.to_thread(self._jobs.resume)]

    def _submit(self, asked: ImageInput | int, top_k: int | None, private: bool) -> JobCore:
        self._require_open()
        task, policy = self._engine.task, self._engine.policy
        if private and not policy.uses_local:
            raise ConfigError(
                f"a private image never leaves the device, and {policy.name} never answers "
                "there: use another policy for it"
            )
        top_k = check_top_k(task, top_k)
        return self._jobs.submit(read_asked(task, asked), top_k, private=private)

    @abstractmethod
    def _require_open(self) -> None:
        """Raise ``ConfigError`` when the runtime is closed."""


def read_asked(task: Task, asked: ImageInput | int) -> Photo | Seed:
    """What the bundle takes. Raises ``ConfigError`` for the other kind, or as ``Photo.read``."""
    if isinstance(task, GenerationTask):
        if not isinstance(asked, int):
            raise ConfigError("this bundle generates images from seeds: pass a whole number")
        return Seed.read(asked)
    if isinstance(asked, int):
        raise ConfigError("this bundle takes images: pass one")
    return Photo.read(asked)


def check_top_k(task: Task, top_k: int | None) -> int | None:
    """What is to be answered; None: all of it. Raises ``ConfigError``."""
    if top_k is not None and not isinstance(task, ClassificationTask | DetectionTask):
        raise ConfigError(f"top_k is for answers that are lists, not for {task_name(task)}")
    if top_k is not None and not 1 <= top_k <= limits.MAX_TOP_K:
        raise ConfigError(f"top_k must be 1 to {limits.MAX_TOP_K}, not {top_k}")
    return task.top_k if top_k is None and isinstance(task, ClassificationTask) else top_k
