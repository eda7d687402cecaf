"""Idempotency keys: a retry joins the first try, or gets its answer, and runs nothing twice.

A device whose connection broke does not know whether its image was answered. It asks again
under the same key. While the first try runs, the retry waits with it; for a while after, it
gets the same answer. Failures are not kept: they are what a retry is for.

One ``Replays`` serves one event loop. Keys of one tenant say nothing to another.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from edge_runtime.contract import limits
from edge_runtime.contract.errors import WireError

__all__ = ["Replays", "Try"]

_T = TypeVar("_T")


class Try(Generic[_T]):
    """One execution under a key, and who waits for it."""

    def __init__(self, fingerprint: object, task: asyncio.Task[_T]) -> None:
        self.fingerprint = fingerprint
        self.task = task
        self.complete = False
        """Its body has arrived: it can end without the connection that it came on."""
        self.waiting = 0
        """Callers that want its answer."""
        self.size_bytes = 0
        self.ended_s: float | None = None

    @property
    def joinable(self) -> bool:
        """Whether another caller need not send its body."""
        return self.complete and not self.task.cancelled()


class Replays(Generic[_T]):
    """Recent tries by tenant and key, bounded in number, bytes and age.

    ``size_of`` says how many bytes an answer holds; ``clock`` gives seconds.
    """

    def __init__(
        self,
        size_of: Callable[[_T], int],
        *,
        max_per_tenant: int = limits.MAX_REPLAYS_PER_TENANT,
        max_bytes: int = limits.MAX_REPLAY_BYTES,
        ttl_ms: float = limits.REPLAY_TTL_MS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._size_of = size_of
        self._max_per_tenant = max_per_tenant
        self._max_bytes = max_bytes
        self._ttl_s = ttl_ms / 1e3
        self._clock = clock
        self._tries: dict[str, OrderedDict[str, Try[_T]]] = {}
        self._ended: OrderedDict[tuple[str, str], Try[_T]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return sum(len(tries) for tries in self._tries.values())

    @property
    def kept_bytes(self) -> int:
        """Answers held for retries."""
        return self._bytes

    def find(self, tenant: str, key: str, fingerprint: object) -> Try[_T] | None:
        """The try under this key, if there is one.

        Raises ``WireError`` when that key stands for another request.
        """
        self._forget_old()
        known = self._tries[tenant].get(key) if tenant in self._tries else None
        if known is not None and known.fingerprint != fingerprint:
            raise WireError(
                "this idempotency key was used for another request: make a new key for each"
            )
        return known

    def start(
        self, tenant: str, key: str, fingerprint: object, work: Coroutine[Any, Any, _T]
    ) -> Try[_T]:
        """Run ``work`` under a key, in place of an earlier try."""
        tries = self._tries.setdefault(tenant, OrderedDict())
        earlier = tries.pop(key, None)
        if earlier is not None:
            self._drop_bytes(tenant, key)
        started = Try(fingerprint, asyncio.ensure_future(work))
        tries[key] = started
        while len(tries) > self._max_per_tenant:
            oldest, _ = tries.popitem(last=False)  # it still runs; only its key is forgotten
            self._drop_bytes(tenant, oldest)
        started.task.add_done_callback(lambda _: self._end(tenant, key, started))
        return started

    def _end(self, tenant: str, key: str, ended: Try[_T]) -> None:
        failed = ended.task.cancelled() or ended.task.exception() is not None
        tries = self._tries.get(tenant, OrderedDict())
        if tries.get(key) is not ended:
            return  # replaced or forgotten meanwhile
        if failed:
            self._remove(tenant, key)
            return
        ended.size_bytes = self._size_of(ended.task.result())
        ended.ended_s = self._clock()
        self._ended[tenant, key] = ended
        self._bytes += ended.size_bytes
        while self._bytes > self._max_bytes:
            self._remove(*next(iter(self._ended)))

    def _forget_old(self) -> None:
        limit_s = self._clock() - self._ttl_s
        while self._ended:
            oldest, ended = next(iter(self._ended.items()))
            if ended.ended_s is None or ended.ended_s > limit_s:
                return
            self._remove(*oldest)

    def _remove(self, tenant: str, key: str) -> None:
        tries = self._tries[tenant]
        tries.pop(key, None)
        self._drop_bytes(tenant, key)
        if not tries:
            del self._tries[tenant]

    def _drop_bytes(self, tenant: str, key: str) -> None:
        ended = self._ended.pop((tenant, key), None)
        if ended is not None:
            self._bytes -= ended.size_bytes
