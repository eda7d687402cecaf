"""The protobuf classes of Core ML's model format, without the weight of coremltools.

``import coremltools`` takes seconds, pulls in torchvision and every converter, and in some
import orders crashes the process. The generated protobuf modules in its folder need none of
that, so they are loaded alone, under a package name of ours. Where coremltools is already
imported, its own are used (protobuf makes both the same classes).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_runtime.contract.errors import BackendUnavailable

__all__ = ["INSTALL", "import_coremltools", "load_schema"]

INSTALL = "pip install 'nearfar[convert]'"
_ALIAS = "edge_runtime_coreml_proto"


def load_schema(module: str) -> Any:
    """One generated module by name, for example ``Model_pb2``.

    Raises ``BackendUnavailable`` when coremltools is not installed.
    """
    if "coremltools" in sys.modules:
        return importlib.import_module(f"coremltools.proto.{module}")
    try:
        if _ALIAS not in sys.modules:
            found = importlib.util.find_spec("coremltools")
            if found is None or not found.submodule_search_locations:
                raise ImportError("coremltools is not installed")
            package = types.ModuleType(_ALIAS)
            package.__path__ = [str(Path(found.submodule_search_locations[0]) / "proto")]
            sys.modules[_ALIAS] = package
        return importlib.import_module(f"{_ALIAS}.{module}")
    except ImportError as error:
        raise BackendUnavailable(f"Core ML: {error}; {INSTALL}") from None


# Optional for coremltools, and costly: 8 s of imports, and TensorFlow crashes the process
# in some orders. None of them is needed for ML programs.
_UNWANTED = ("tensorflow", "sklearn", "torchao", "executorch", "xgboost", "transformers")


@contextlib.contextmanager
def _without_optional_imports() -> Iterator[None]:
    """Make ``import`` of the unwanted packages fail for a moment, unless already loaded."""
    absent = [name for name in _UNWANTED if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in absent:
            if sys.modules.get(name, False) is None:
                del sys.modules[name]


def import_coremltools() -> Any:
    """Import coremltools safely and silently; torchvision must come before it.

    Needed to write packages, not to run them. Raises ``BackendUnavailable`` when either is
    not installed.
    """
    if "coremltools" in sys.modules:
        return sys.modules["coremltools"]
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        import torchvision  # noqa: F401  # loaded after coremltools it crashes the process

        with _without_optional_imports(), contextlib.redirect_stderr(io.StringIO()):
            import coremltools
    except ImportError as error:
        raise BackendUnavailable(f"Core ML: {error}; {INSTALL}") from None
    return coremltools
