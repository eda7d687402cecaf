"""OpenVINO on the CPU, from the same ``torch.export`` program."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.executors.base import LoadedModel
from broker.executors.runtimes.base import Affine, OutOfMemory, first_line, normalized
from broker.executors.runtimes.quantize import quantize
from edge_runtime.contract.errors import BackendUnavailable, InferenceError, ModelLoadError

__all__ = ["OpenVinoRuntime"]

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}
"""For int8: of what is not quantized."""


class OpenVinoRuntime:
    """Raises ``BackendUnavailable`` without OpenVINO, and ``ModelLoadError``.

    ``learned``: inputs of the model that int8 takes its ranges from.
    """

    def __init__(
        self,
        exported: Any,
        precision: str,
        threads: int,
        learned: Sequence[NDArray[np.generic]] = (),
    ) -> None:
        openvino = _import_openvino()
        self.info = LoadedModel("openvino", precision)
        model = openvino.convert_model(exported)
        if precision == "int8" and not quantize(openvino, model, learned):
            raise ModelLoadError("the model has no weights that 8-bit integers could hold")
        self._compiled = openvino.Core().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _HINTS[precision],
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": 1,
            },
        )
        self._request = self._compiled.create_infer_request()

    def forward(
        self, rows: NDArray[np.generic], affine: Affine | None
    ) -> list[NDArray[np.generic]]:
        """See ``ModelRuntime.forward``."""
        if affine is not None:
            rows = normalized(rows, affine)
        try:
            given = self._request.infer([rows], share_inputs=True)
        except MemoryError:
            raise OutOfMemory from None
        except RuntimeError as error:
            if "allocate" in str(error):
                raise OutOfMemory from None
            raise InferenceError(f"the model failed: {first_line(error)}") from None
        outputs = [np.array(given[port]) for port in self._compiled.outputs]
        return [
            output.astype(np.float32) if output.dtype.kind == "f" else output for output in outputs
        ]

    def free(self) -> None:
        """See ``ModelRuntime.free``."""
        self._request = self._compiled = None


def _import_openvino() -> Any:
    """OpenVINO, which then tells nobody that it runs.

    Its packages send events at import and at conversion unless a user opted out on this
    machine. Where the package that sends cannot be imported, they take a stub of their own.
    """
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise BackendUnavailable(f"openvino: {error}; pip install 'nearfar[openvino]'") from None
    return openvino
