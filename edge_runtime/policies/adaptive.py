"""ADAPTIVE, the runtime's default: ``ExpectedUtility`` at the runtime's own prices."""

from __future__ import annotations

from edge_runtime.policies.base import InferenceMode
from edge_runtime.policies.gain import GainPrior
from edge_runtime.policies.utility import ExpectedUtility

__all__ = ["Adaptive", "Balanced", "ForAccuracy", "GainPrior", "Saver"]


class Adaptive(ExpectedUtility):
    """``ExpectedUtility:balanced`` under the name of an inference mode."""

    def __init__(self, gain: GainPrior | None = None) -> None:
        super().__init__("balanced", gain)
        self.name = InferenceMode.ADAPTIVE.value


class ForAccuracy(ExpectedUtility):
    """``ExpectedUtility:accuracy``, as an entry point makes it: without arguments."""

    def __init__(self) -> None:
        super().__init__("accuracy")


class Balanced(ExpectedUtility):
    """``ExpectedUtility:balanced``."""

    def __init__(self) -> None:
        super().__init__("balanced")


class Saver(ExpectedUtility):
    """``ExpectedUtility:saver``."""

    def __init__(self) -> None:
        super().__init__("saver")
