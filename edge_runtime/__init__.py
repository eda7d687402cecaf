"""nearfar on the device: open a bundle, decide per request, answer locally or offload.

    from edge_runtime import EdgeRuntime

    with EdgeRuntime("digits.bundle", broker="https://broker.example") as runtime:
        result = runtime.run("photo.jpg", deadline_ms=400)
        print(result.label, result.score, result.inference_source)

Names load when they are first used: importing this package costs about a millisecond and
loads no interpreter, no HTTP client and not even numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_runtime.bundle import Bundle
    from edge_runtime.conditions import Conditions, ConditionsSource, PlatformSignals
    from edge_runtime.contract.errors import (
        BackendUnavailable,
        BrokerFault,
        CircuitOpen,
        ConfigError,
        ContractError,
        DeadlineExceeded,
        ImageError,
        LabelsMismatch,
        ManifestError,
        ModelNotFound,
        NearfarError,
        NetworkUnreachable,
        Overloaded,
        RemoteError,
        RequestRejected,
        RuntimeFault,
        TrustError,
        Unauthorized,
        WireError,
    )
    from edge_runtime.contract.tasks import Box, Prediction
    from edge_runtime.contract.tasks.answer import Answer
    from edge_runtime.jobs.job import AsyncJob, Job
    from edge_runtime.policies.base import (
        Action,
        Decision,
        InferenceMode,
        Policy,
        Prices,
        Situation,
    )
    from edge_runtime.results import InferenceSource, Result, Status, Timings
    from edge_runtime.runtime import EdgeRuntime
    from edge_runtime.signals import LinuxSignals, SettableSignals

_HOME = {
    "edge_runtime.bundle": ("Bundle",),
    "edge_runtime.conditions": ("Conditions", "ConditionsSource", "PlatformSignals"),
    "edge_runtime.contract.errors": (
        "BackendUnavailable",
        "BrokerFault",
        "CircuitOpen",
        "ConfigError",
        "ContractError",
        "DeadlineExceeded",
        "ImageError",
        "LabelsMismatch",
        "ManifestError",
        "ModelNotFound",
        "NearfarError",
        "NetworkUnreachable",
        "Overloaded",
        "RemoteError",
        "RequestRejected",
        "RuntimeFault",
        "TrustError",
        "Unauthorized",
        "WireError",
    ),
    "edge_runtime.contract.tasks": ("Box", "Prediction"),
    "edge_runtime.contract.tasks.answer": ("Answer",),
    "edge_runtime.jobs.job": ("AsyncJob", "Job"),
    "edge_runtime.policies.base": (
        "Action",
        "Decision",
        "InferenceMode",
        "Policy",
        "Prices",
        "Situation",
    ),
    "edge_runtime.results": ("InferenceSource", "Result", "Status", "Timings"),
    "edge_runtime.runtime": ("EdgeRuntime",),
    "edge_runtime.signals": ("LinuxSignals", "SettableSignals"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Action",
    "Answer",
    "AsyncJob",
    "BackendUnavailable",
    "Box",
    "BrokerFault",
    "Bundle",
    "CircuitOpen",
    "Conditions",
    "ConditionsSource",
    "ConfigError",
    "ContractError",
    "DeadlineExceeded",
    "Decision",
    "EdgeRuntime",
    "ImageError",
    "InferenceMode",
    "InferenceSource",
    "Job",
    "LabelsMismatch",
    "LinuxSignals",
    "ManifestError",
    "ModelNotFound",
    "NearfarError",
    "NetworkUnreachable",
    "Overloaded",
    "PlatformSignals",
    "Policy",
    "Prediction",
    "Prices",
    "RemoteError",
    "RequestRejected",
    "Result",
    "RuntimeFault",
    "SettableSignals",
    "Situation",
    "Status",
    "Timings",
    "TrustError",
    "Unauthorized",
    "WireError",
]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'edge_runtime' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
