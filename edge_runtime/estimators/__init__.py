"""What is known about link, broker and device: small frozen states, updated by pure functions.

No estimator reads a clock: callers pass the time in. An update returns a new state, so a
state can be shared between threads, stored, and replayed.
"""

from edge_runtime.estimators.arrivals import ArrivalEstimator
from edge_runtime.estimators.cloud import CloudEstimator
from edge_runtime.estimators.link import LinkEstimate, LinkEstimator
from edge_runtime.estimators.local import LocalEstimator
from edge_runtime.estimators.path import PathEstimator
from edge_runtime.estimators.rtt import RttEstimator

__all__ = [
    "ArrivalEstimator",
    "CloudEstimator",
    "LinkEstimate",
    "LinkEstimator",
    "LocalEstimator",
    "PathEstimator",
    "RttEstimator",
]
