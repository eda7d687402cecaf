"""Read the MIL program and weights out of an ``.mlpackage``."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_runtime.contract.errors import BackendUnavailable, ModelLoadError

__all__ = ["import_coremltools", "model_file", "read_program", "read_spec", "weights_folder"]


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

    Raises ``BackendUnavailable`` when either is not installed.
    """
    if "coremltools" in sys.modules:
        return sys.modules["coremltools"]
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        import torchvision  # noqa: F401  # loaded after coremltools it crashes the process

        with _without_optional_imports(), contextlib.redirect_stderr(io.StringIO()):
            import coremltools
    except ImportError as error:
        raise BackendUnavailable(f"Core ML: {error}; pip install 'nearfar[convert]'") from None
    return coremltools


def weights_folder(package: Path) -> Path:
    """Where an ``.mlpackage`` keeps its weight blobs."""
    return package / "Data" / "com.apple.CoreML" / "weights"


def model_file(package: Path) -> Path:
    """Where an ``.mlpackage`` keeps its program."""
    return package / "Data" / "com.apple.CoreML" / "model.mlmodel"


def read_spec(package: Path) -> Any:
    """The package's protobuf ``Model``. Raises ``ModelLoadError``.

    Not through ``coremltools.utils.load_spec``, which rewrites ``Manifest.json`` as it
    reads and so breaks the package's digest.
    """
    import_coremltools()
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    try:
        spec.ParseFromString(model_file(package).read_bytes())
    except Exception as error:  # OSError, protobuf's DecodeError
        raise ModelLoadError(
            f"{package.name} holds no Core ML model: {type(error).__name__}: {error}"
        ) from None
    return spec


def read_program(package: Path) -> Any:
    """The ``main`` function of the package's ML program, as coremltools' pymil.

    Raises ``ModelLoadError`` for a folder that is no ML program package.
    """
    spec = read_spec(package)
    from coremltools.converters.mil.frontend.milproto.load import load

    if spec.WhichOneof("Type") != "mlProgram":
        raise ModelLoadError(f"{package.name} is no ML program: convert it again")
    try:
        program = load(spec, spec.specificationVersion, str(weights_folder(package)))
        return program.functions["main"]
    except Exception as error:  # many coremltools types
        reason = str(error).split("\n", 1)[0]
        raise ModelLoadError(
            f"coremltools cannot load {package.name}: {type(error).__name__}: {reason}"
        ) from None
