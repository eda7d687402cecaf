"""ADAPTIVE, the runtime's default: ``ExpectedUtility`` at the runtime's own prices."""

from __future__ import annotations

from edge_runtime.policies.base import InferenceMode
from edge_runtime.policies.gain import Gain, GainPrior
from edge_runtime.policies.utility import ExpectedUtility

__all__ = ["Adaptive", "Balanced", "ForAccuracy", "GainPrior", "Saver"]


class Adaptive(ExpectedUtility):
    """``ExpectedUtility:balanced`` under the name of an inference mode."""

    def __init__(self, gain: Gain | None = None) -> None:
        super().__init__("balanced", gain)
        self.name = InferenceMode.ADAPTIVE.value

    def with_gain(self, gain: Gain) -> Adaptive:
        """The same with a measured gain."""
        return type(self)(gain)


class ForAccuracy(ExpectedUtility):
    """``ExpectedUtility:accuracy``, as an entry point makes it."""

    def __init__(self, gain: Gain | None = None) -> None:
        super().__init__("accuracy", gain)

    def with_gain(self, gain: Gain) -> ForAccuracy:
        """The same with a measured gain."""
        return type(self)(gain)


class Balanced(ExpectedUtility):
    """``ExpectedUtility:balanced``."""

    def __init__(self, gain: Gain | None = None) -> None:
        super().__init__("balanced", gain)

    def with_gain(self, gain: Gain) -> Balanced:
        """The same with a measured gain."""
        return type(self)(gain)


class Saver(ExpectedUtility):
    """``ExpectedUtility:saver``."""

    def __init__(self, gain: Gain | None = None) -> None:
        super().__init__("saver", gain)

    def with_gain(self, gain: Gain) -> Saver:
        """The same with a measured gain."""
        return type(self)(gain)
