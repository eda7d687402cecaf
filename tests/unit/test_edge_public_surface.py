"""What users import, and what importing costs."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import edge_runtime

PUBLIC = [
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


def test_the_public_names_are_pinned() -> None:
    assert edge_runtime.__all__ == PUBLIC == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_the_object_of_its_home_module(name: str) -> None:
    value = getattr(edge_runtime, name)
    home = importlib.import_module(value.__module__)
    assert getattr(home, name) is value


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'EdgeRuntimes'"):
        _ = edge_runtime.EdgeRuntimes
    assert "EdgeRuntime" in dir(edge_runtime)


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_no_backend_and_not_even_numpy() -> None:
    loaded = modules_after("import edge_runtime")
    heavy = {"torch", "tensorflow", "coremltools", "aiohttp", "ai_edge_litert", "numpy", "PIL"}
    assert not loaded & heavy


def test_importing_the_runtime_loads_no_backend_and_no_http_client() -> None:
    loaded = modules_after("from edge_runtime import EdgeRuntime")
    assert "numpy" in loaded
    assert not loaded & {"torch", "tensorflow", "coremltools", "aiohttp", "ai_edge_litert", "click"}


def test_a_broker_without_the_http_client_says_what_to_install() -> None:
    from tests.support.bundles import tiny_bundle

    code = (
        "import sys\n"
        "sys.modules['aiohttp'] = None\n"
        "from edge_runtime import BackendUnavailable, EdgeRuntime\n"
        "try:\n"
        f"    EdgeRuntime({str(tiny_bundle())!r}, 'http://127.0.0.1:9')\n"
        "except BackendUnavailable as error:\n"
        "    assert \"pip install 'nearfar[edge]'\" in error.detail\n"
        "else:\n"
        "    raise SystemExit('not refused')"
    )
    assert "numpy" in modules_after(code)


def test_a_runtime_without_a_broker_loads_no_http_client() -> None:
    from tests.support.bundles import photo, tiny_bundle

    loaded = modules_after(
        "from edge_runtime import EdgeRuntime\n"
        f"with EdgeRuntime({str(tiny_bundle())!r}) as runtime:\n"
        f"    runtime.run({photo(0)!r})"
    )
    assert "ai_edge_litert" in loaded
    assert "aiohttp" not in loaded
