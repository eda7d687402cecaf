"""From a PyTorch module to the bytes of a float ``.tflite``, through litert-torch.

Images are NHWC in the file, inputs and outputs alike; latents and heads stay as they are.
Tensors are named after the modules they come from: ``net/features.0;``, with ``around/;``
for the normalization, NMS or argmax around the net. The quantizer's recipes go by these
names, and the converter's own repeat every class name (a third of a small int8 file).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from converters.formats.base import unsupported
from converters.ready import ReadyModule
from edge_runtime.contract.tensors import TensorSpec

__all__ = ["AROUND", "NET", "channels_last", "export_float"]

NET = "net/"
AROUND = "around/"
_LAYOUT = "layout/"


def channels_last(spec: TensorSpec) -> TensorSpec:
    """What an NCHW tensor is in the file: NHWC; any other tensor is itself."""
    if spec.layout != "NCHW":
        return spec
    batch, channels, height, width = spec.shape
    return msgspec.structs.replace(spec, shape=(batch, height, width, channels), layout="NHWC")


def export_float(ready: ReadyModule) -> bytes:
    """Convert ``ready.module``. Raises ``UnsupportedOperator``.

    The signature's outputs are ``output_0``, ``output_1`` ... in the order of
    ``ready.outputs``.
    """
    import torch
    import torchvision  # noqa: F401  # before anything that loads TensorFlow
    import litert_torch  # isort: skip

    module = _in_layout(ready)
    example = ready.example
    if ready.inputs[0].layout == "NCHW":
        example = example.permute(0, 2, 3, 1).contiguous()
    try:
        with torch.no_grad(), _named_after_modules(_inner_prefix(ready.module)):
            edge = litert_torch.convert(module, (example,))
        return bytes(edge.model_content())
    except Exception as error:  # litert-torch raises many types
        raise unsupported("tflite", error) from error


def _in_layout(ready: ReadyModule) -> Any:
    """``ready.module`` behind the permutations of its image tensors."""
    import torch
    from torch import nn

    class ChannelsLast(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> Any:
            if ready.inputs[0].layout == "NCHW":
                x = x.permute(0, 3, 1, 2)
            answer = self.model(x)
            parts = list(answer) if isinstance(answer, tuple | list) else [answer]
            for number, spec in enumerate(ready.outputs):
                if spec.layout == "NCHW":
                    parts[number] = parts[number].permute(0, 2, 3, 1)
            return parts[0] if len(parts) == 1 else tuple(parts)

    return ChannelsLast(ready.module).eval()


def _inner_prefix(module: Any) -> str:
    """Path of the net inside ``ChannelsLast``."""
    from converters.formats.inner import inner_module

    path = "model"
    inner = inner_module(module)
    while module is not inner:
        module, path = module.model, f"{path}.model"
    return path


@contextmanager
def _named_after_modules(prefix: str) -> Iterator[None]:
    """Have litert-torch name operators after module paths while the block runs."""
    from litert_torch.backend import debuginfo

    original = debuginfo.build_mlir_debuginfo

    def build(node: Any) -> str | None:
        stack = getattr(node, "meta", {}).get("nn_module_stack")
        return None if stack is None else _location(list(stack.values()), prefix)

    debuginfo.build_mlir_debuginfo = build
    try:
        yield
    finally:
        debuginfo.build_mlir_debuginfo = original


def _location(stack: Sequence[tuple[str, Any]], prefix: str) -> str:
    """``net/<path>;``, ``around/;`` or ``layout/;`` for the modules a node lies in."""
    path = stack[-1][0] if stack else ""
    path = re.sub(r"@\d+", "", path).removeprefix("L['self'].")
    if path == prefix or path.startswith(f"{prefix}."):
        return f"{NET}{path[len(prefix) + 1 :]};"
    return f"{AROUND};" if path else f"{_LAYOUT};"
