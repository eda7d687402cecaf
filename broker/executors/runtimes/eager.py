"""PyTorch: operator by operator, or compiled by inductor.

In half precision the weights are converted once and convolutions run channels last, the
order that their kernels want.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from broker.executors.base import LoadedModel
from broker.executors.runtimes.base import Affine, OutOfMemory, first_line
from edge_runtime.contract.errors import InferenceError

__all__ = ["TorchRuntime"]

_CPU_ALLOCATOR: Final = "DefaultCPUAllocator: "
"""How torch begins to say that the system gave it no memory."""


class TorchRuntime:
    """A ``torch.export`` program on ``cpu`` or ``cuda``."""

    def __init__(
        self, exported: Any, device: str, precision: str, *, compiled: bool = False
    ) -> None:
        import torch
        from torch.export.passes import move_to_device_pass

        self.info = LoadedModel("compile" if compiled else "eager", precision)
        self._device = device
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        self._dtype = dtypes[precision]
        self._module = move_to_device_pass(exported, device).module()
        if precision != "fp32":
            # A copy: the fp32 runtime that this one is compared with has the same weights.
            self._module = copy.deepcopy(self._module).to(dtype=self._dtype)
            for weight in self._module.parameters():
                if weight.dim() == 4:
                    weight.data = weight.data.to(memory_format=torch.channels_last)
        if compiled:
            self._module = _compiled(self._module)

    def forward(
        self, rows: NDArray[np.generic], affine: Affine | None
    ) -> list[NDArray[np.generic]]:
        """See ``ModelRuntime.forward``."""
        import torch

        try:
            with torch.inference_mode():
                answer = self._module(self._input(rows, affine))
                outputs = answer if isinstance(answer, tuple | list) else (answer,)
                if not all(isinstance(output, torch.Tensor) for output in outputs):
                    raise InferenceError("the model gives something that is no tensor")
                return [_to_numpy(output) for output in outputs]
        except MemoryError:
            raise OutOfMemory from None
        except torch.AcceleratorError:
            raise  # the device context is broken: only a new process mends that
        except InferenceError:
            raise
        except Exception as error:  # a program's own code raises whatever it likes
            if isinstance(error, torch.OutOfMemoryError) or _CPU_ALLOCATOR in str(error):
                raise OutOfMemory from None
            raise InferenceError(f"the model failed: {first_line(error)}") from None

    def _input(self, rows: NDArray[np.generic], affine: Affine | None) -> Any:
        import torch

        batch = torch.from_numpy(rows)
        if self._device == "cuda":
            batch = batch.pin_memory().to("cuda", non_blocking=True)
        if affine is not None:
            scale, shift = (torch.from_numpy(part).to(self._device) for part in affine)
            batch = torch.addcmul(shift, batch.to(torch.float32), scale)
        if self._dtype != torch.float32 and batch.is_floating_point():
            batch = batch.to(self._dtype)
            if batch.dim() == 4:
                batch = batch.contiguous(memory_format=torch.channels_last)
        return batch

    def free(self) -> None:
        """See ``ModelRuntime.free``."""
        self._module = None


def _to_numpy(tensor: Any) -> NDArray[np.generic]:
    """On the CPU; numpy has no bfloat16, so floats become float32."""
    on_cpu = tensor.float() if tensor.is_floating_point() else tensor
    return np.ascontiguousarray(on_cpu.cpu().numpy())


def _compiled(module: Any) -> Any:
    """By inductor, for any batch size; what it compiled is kept for the next process."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "nearfar" / "inductor"))
    import torch
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # no pool of processes beside this one
    inductor.fx_graph_cache = True
    return torch.compile(module, dynamic=True)
