"""The policies that are compared, by the names that a result shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from edge_runtime.contract.errors import ConfigError
from edge_runtime.policies.base import Policy
from edge_runtime.policies.learned import HarmonicMean, LinUCB, MinLatency, Quantile
from edge_runtime.policies.registry import find_policy
from edge_runtime.policies.statics import (
    BandwidthThreshold,
    Cascade,
    CloudOnly,
    Hedged,
    LocalOnly,
)
from edge_runtime.policies.utility import ExpectedUtility

__all__ = ["LINEUP", "ORACLES", "STATIC_POLICIES", "expand_policies", "make_policy"]

_MAKERS: Final[dict[str, Callable[[], Policy]]] = {
    "LocalOnly": LocalOnly,
    "CloudOnly": CloudOnly,
    "BandwidthThreshold": BandwidthThreshold,
    "MinLatency": MinLatency,
    "HarmonicMean": HarmonicMean,
    "Quantile": Quantile,
    "LinUCB": LinUCB,
    "Hedged": Hedged,
    "Cascade(0.5)": lambda: Cascade(0.5),
    "Cascade(0.7)": lambda: Cascade(0.7),
    "Cascade(0.9)": lambda: Cascade(0.9),
    "ExpectedUtility:accuracy": lambda: ExpectedUtility("accuracy"),
    "ExpectedUtility:balanced": lambda: ExpectedUtility("balanced"),
    "ExpectedUtility:saver": lambda: ExpectedUtility("saver"),
}
ORACLES: Final = ("Oracle", "Oracle:net", "Oracle:saver")
"""Clairvoyant bounds of accuracy, and of net utility at two sets of prices."""
LINEUP: Final = (*_MAKERS, *ORACLES)
STATIC_POLICIES: Final = (
    "LocalOnly",
    "CloudOnly",
    "BandwidthThreshold",
    "Hedged",
    "Cascade(0.5)",
    "Cascade(0.7)",
    "Cascade(0.9)",
)
"""Those that fix one action or threshold for good."""
_CASCADE = re.compile(r"Cascade\((0(?:\.\d{1,4})?|1(?:\.0{1,4})?)\)")


def expand_policies(names: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """``all`` becomes the whole line-up; duplicates go. Raises ``ConfigError``."""
    expanded: list[str] = []
    for name in names:
        expanded += LINEUP if name == "all" else (name,)
    if not expanded:
        raise ConfigError("no policy to simulate: name some, or all")
    for name in expanded:
        if name not in ORACLES:
            make_policy(name)
    return tuple(dict.fromkeys(expanded))


def make_policy(name: str) -> Policy:
    """A policy of the line-up, ``Cascade(theta)``, or a registered one by its name."""
    maker = _MAKERS.get(name)
    if maker is not None:
        return maker()
    cascade = _CASCADE.fullmatch(name)
    if cascade is not None:
        return Cascade(float(cascade.group(1)))
    try:
        return find_policy(name)
    except ConfigError as error:
        raise ConfigError(f"{error.detail}; the simulator also has: {', '.join(LINEUP)}") from None
