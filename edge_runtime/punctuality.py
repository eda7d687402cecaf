"""How late alarms ring here, and so how long before its deadline a held answer must leave.

A thread that sleeps until a held answer is due wakes late where other threads hold the
interpreter, other programs the processor, or an app its own event loop. The margin is a part
of the deadline and what alarms were late lately: their largest lateness, which fades.
"""

from __future__ import annotations

import threading

__all__ = ["Punctuality"]

_SHARE = 0.1
_MOST_MS = 10.0
"""Of a machine whose alarms ring in time: waking, and handing the answer over."""
_MOST_SHARE = 0.2
"""Of the deadline: a machine that is later than this keeps no deadline anyhow."""
_KEPT = 0.5 ** (1 / 64)
"""Half is forgotten after so many alarms."""


class Punctuality:
    """Thread-safe; shared by the requests of one runtime."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._peak_ms = 0.0

    def rang(self, late_ms: float) -> None:
        """An alarm was served ``late_ms`` after it was due."""
        with self._lock:
            self._peak_ms = max(late_ms, self._peak_ms * _KEPT)

    def guard_ms(self, deadline_ms: float) -> float:
        """How long before a deadline of ``deadline_ms`` a held answer leaves."""
        usual_ms = min(_MOST_MS, _SHARE * deadline_ms)
        with self._lock:
            return min(usual_ms + self._peak_ms, _MOST_SHARE * deadline_ms)
