"""What the words of a path or a column say: direction, radio, rate or round trip, and unit.

Nothing here knows a data set. Words are what is left between letters and digits of other
kinds: ``uplink-3G_noCross.up`` has uplink, 3g, no, cross and up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Literal

__all__ = [
    "DATA_SUFFIXES",
    "Direction",
    "Kind",
    "Radio",
    "column_direction",
    "find_partner",
    "name_words",
    "pair_words",
    "path_direction",
    "path_kind",
    "path_radio",
    "radio_named",
    "rate_factor",
]

Direction = Literal["uplink", "downlink"]
Kind = Literal["rate", "rtt"]
Radio = Literal["3g", "lte", "5g", "wifi"]

DATA_SUFFIXES: Final = frozenset({"txt", "csv", "tsv", "list", "log", "dat", "data", "pps"})
"""Endings of a file name that say nothing about what is in it."""

_UP: Final = frozenset({"up", "uplink", "ul", "upload", "upstream"})
_DOWN: Final = frozenset({"down", "downlink", "dl", "download", "downstream"})
_RTT: Final = frozenset({"rtt", "rtts", "ping", "pings", "latency", "latencies", "delay"})
_RATE: Final = frozenset(
    {"throughput", "tput", "goodput", "rate", "rates", "bandwidth", "bw", "capacity", "mbps"}
)
_RADIOS: Final[dict[str, Radio]] = {
    **dict.fromkeys(("3g", "umts", "hspa", "hsdpa", "hsupa", "wcdma", "evdo"), "3g"),
    **dict.fromkeys(("lte", "4g", "cellular"), "lte"),
    **dict.fromkeys(("5g", "nr", "mmwave", "nsa", "endc"), "5g"),
    **dict.fromkeys(("wifi", "wlan", "80211"), "wifi"),
}
_CAMEL: Final = re.compile(r"(?<=[a-z])(?=[A-Z])")
_UNIT: Final = re.compile(
    r"(?<![A-Za-z])([GMKgmk]?)(bits?|bytes?|b)"
    r"(ps|[ _/]*(?:per[ _]*)?s(?:ec(?:onds?)?)?)?(?![A-Za-z])",
    re.IGNORECASE,
)
_PREFIX: Final = {"g": 1e9, "m": 1e6, "k": 1e3, "": 1.0}


def name_words(name: str) -> list[str]:
    """The words of a name, in lower case."""
    return re.findall(r"[a-z0-9]+", _CAMEL.sub("_", name).lower())


def column_direction(name: str) -> Direction | None:
    """What a column's name says; None: nothing, or both."""
    words = set(name_words(name))
    up, down = bool(words & (_UP | {"tx"})), bool(words & (_DOWN | {"rx"}))
    if up == down:
        return None
    return "uplink" if up else "downlink"


def path_direction(path: str) -> Direction | None:
    """What a relative path says. The part nearest to the file decides: the file's own name first.

    None: no part says, or the first that does says both.
    """
    for part in reversed(path.split("/")):
        words = set(name_words(part))
        up, down = bool(words & _UP), bool(words & _DOWN)
        if up or down:
            return None if up and down else "uplink" if up else "downlink"
    return None


def path_kind(path: str) -> Kind | None:
    """Whether a relative path speaks of rates or of round trips; nearest part first."""
    for part in reversed(path.split("/")):
        words = set(name_words(part))
        rtt, rate = bool(words & _RTT), bool(words & (_RATE | _UP | _DOWN))
        if rtt or rate:
            return None if rtt and rate else "rtt" if rtt else "rate"
    return None


def radio_named(text: str) -> Radio | None:
    """The radio that a text names; None: none, or several."""
    found = {_RADIOS[word] for word in name_words(text.replace("-", "")) if word in _RADIOS}
    found |= {_RADIOS[word] for word in name_words(text) if word in _RADIOS}
    return found.pop() if len(found) == 1 else None


def path_radio(path: str) -> Radio | None:
    """The radio that a relative path names; nearest part first."""
    for part in reversed(path.split("/")):
        radio = radio_named(part)
        if radio is not None:
            return radio
    return None


def pair_words(path: str) -> tuple[str, ...]:
    """What tells one recording from another: a path's words without kind, direction, ending."""
    dull = _RTT | _RATE | _UP | _DOWN | DATA_SUFFIXES
    return tuple(word for word in name_words(path) if word not in dull)


def find_partner(path: str, candidates: Sequence[str], radio: Radio | None) -> str | None:
    """Which of the files of round trips belongs to a rate's file.

    The one whose path has the same words, kind and direction aside; else the one whose words
    all occur in the rate's path, most of them; else the only one of its folder. Never one of
    another radio.
    """
    fitting = [other for other in candidates if radio is None or path_radio(other) in (None, radio)]
    own = pair_words(path)
    same = [other for other in fitting if pair_words(other) == own]
    if same:
        return same[0]
    shared = {other: set(pair_words(other)) for other in fitting}
    within = {other: len(words) for other, words in shared.items() if words and words <= set(own)}
    best = [other for other, count in within.items() if count == max(within.values())]
    if len(best) == 1:
        return best[0]
    place = pair_words(path.rpartition("/")[0])
    beside = [other for other in fitting if pair_words(other.rpartition("/")[0]) == place]
    return beside[0] if len(beside) == 1 else None


def rate_factor(name: str) -> float | None:
    """What a column's unit must be multiplied by to give Mbit/s; None: no unit in its name.

    ``uplink_mbps``, ``ul (kbit/s)``, ``rate_bps``, ``tx bytes/s``, ``MBps``. Bytes need their
    "per second": without, they may be a counter. A lower-case b is a bit, as is any b of a
    name without lower-case letters.
    """
    for text in (name, _CAMEL.sub("_", name)):
        for prefix, unit, per_second in _UNIT.findall(text):
            is_byte = unit.lower().startswith("byte") or (unit == "B" and text != text.upper())
            is_short = unit.lower() == "b"
            if (is_byte or is_short) and not per_second:
                continue
            return _PREFIX[prefix.lower()] * (8.0 if is_byte else 1.0) / 1e6
    return None
