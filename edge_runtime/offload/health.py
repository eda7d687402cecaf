"""How the broker fares: the breaker, refusals to honor for a while, and the last error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from edge_runtime.contract.errors import CircuitOpen, NearfarError
from edge_runtime.offload.breaker import Breaker
from edge_runtime.offload.messages import refusal
from edge_runtime.offload.transport import HttpResponse

__all__ = ["Health"]

_log = logging.getLogger(__name__)


class Health:
    """Fed with every outcome by the network thread; read from any thread."""

    def __init__(self, random: Callable[[], float]) -> None:
        self.breaker = Breaker(random)
        self.last_error: str | None = None
        self._held: tuple[float, NearfarError] | None = None

    def held_error(self) -> NearfarError | None:
        """The refusal that still holds: ``Retry-After``, a wrong key, other labels."""
        held = self._held
        return held[1] if held is not None and time.monotonic() < held[0] else None

    def require_not_held(self) -> None:
        """Raise the refusal that still holds, without asking the broker again."""
        held = self.held_error()
        if held is not None:
            raise type(held)(held.detail)

    def require_closed(self) -> None:
        """Raise ``CircuitOpen`` unless the breaker is closed."""
        if self.breaker.state != "CLOSED":
            raise CircuitOpen(
                "the broker failed several times in a row and is left alone for some seconds: "
                "try again later"
            )

    def check_status(self, response: HttpResponse) -> None:
        """Raise and remember what a status other than 200 means."""
        no = refusal(response)
        if no is None:
            return
        if no.hard:
            self.failed(no.error, hold_s=no.hold_s)
        else:
            self.refused(no.error, hold_s=no.hold_s)
        raise no.error

    def alive(self) -> None:
        """The broker answered something; a refusal that holds still does."""
        self.last_error = None
        if self.breaker.state != "CLOSED":
            _log.info("the broker answers again")
        self.breaker.succeed()

    def answered(self) -> None:
        """The broker answered an image."""
        self.alive()
        self._held = None

    def refused(self, error: NearfarError, *, hold_s: float) -> None:
        """The broker works and says no."""
        self.breaker.succeed()
        self._remember(error, hold_s)

    def failed(self, error: NearfarError, *, hold_s: float = 0.0) -> None:
        """A hard failure."""
        before = self.breaker.state
        self.breaker.fail(time.monotonic())
        if before == "CLOSED" and self.breaker.state == "OPEN":
            _log.warning("the broker is left alone for some seconds: %s", error.detail)
        self._remember(error, hold_s)

    def missed(self, error: NearfarError) -> None:
        """Too late: for the estimators, not for the breaker."""
        self.last_error = error.code

    def _remember(self, error: NearfarError, hold_s: float) -> None:
        self.last_error = error.code
        if hold_s > 0:
            self._held = (time.monotonic() + hold_s, error)
