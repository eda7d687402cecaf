"""What the radio of one run consumed."""

from __future__ import annotations

from edge_runtime.estimators.energy import RadioPower

__all__ = ["RadioMeter"]


class RadioMeter:
    """Collects activity; bills promotion, transfer, the time connected, and tails."""

    def __init__(self, radio: RadioPower) -> None:
        self._radio = radio
        self._spans: list[tuple[float, float, float]] = []
        self._joules = 0.0

    def used(
        self, begin_s: float, sent_s: float, end_s: float, size_bytes: float, *, promoted: bool
    ) -> None:
        """Bytes moved from ``begin_s`` to ``sent_s``; the last reply came at ``end_s``."""
        if promoted:
            self._joules += self._radio.promotion_joules()
            begin_s += self._radio.promotion_s
        sent_s = max(begin_s, sent_s)
        self._joules += self._radio.transfer_joules(size_bytes, 0.0)
        self._spans.append((begin_s, sent_s, max(sent_s, end_s)))

    def joules(self) -> float:
        """Of everything so far, the last tail included.

        While bytes move the radio draws its base power; connected but silent, and after the
        last activity, that of its tail.
        """
        total = self._joules
        silent_from_s = active_to_s = None
        for begin_s, sent_s, end_s in sorted(self._spans):
            if silent_from_s is None or active_to_s is None:
                silent_from_s = active_to_s = begin_s
            if begin_s > silent_from_s:
                total += self._radio.tail_joules(begin_s - silent_from_s)
            start_s = max(begin_s, active_to_s)
            if sent_s > start_s:
                total += self._radio.base_watts * (sent_s - start_s)
                active_to_s = sent_s
            if end_s > sent_s and end_s > silent_from_s:
                watts = self._radio.tail[0][1] if self._radio.tail else 0.0
                total += watts * (end_s - max(sent_s, silent_from_s))
            silent_from_s = max(silent_from_s, end_s)
        if silent_from_s is not None:
            total += self._radio.tail_joules(self._radio.tail_s)
        return total
