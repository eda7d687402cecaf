"""Two gaps in coremltools 9 that its converter front end has today, filled from outside."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["fill_gaps"]

# Names that PyTorch documents as aliases and coremltools does not know.
_ALIASES = {
    "absolute": "abs",
    "arccos": "acos",
    "concatenate": "cat",
    "divide": "div",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "special_expit": "sigmoid",
    "subtract": "sub",
    "swapaxes": "transpose",
    "swapdims": "transpose",
}


def fill_gaps() -> None:
    """Teach the PyTorch front end aliases and one-element arrays. Safe to call again."""
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.frontend.torch.torch_op_registry import (
        _TORCH_OPS_REGISTRY as REGISTRY,
    )

    for alias, name in _ALIASES.items():
        if REGISTRY.get_func(alias) is None and REGISTRY.get_func(name) is not None:
            REGISTRY.set_func_by_name(REGISTRY.get_func(name), alias)
    original = ops._cast
    if getattr(original, "nearfar", False):
        return

    def cast(context: Any, node: Any, dtype: Any, dtype_name: str) -> None:
        """``int(array([3]))`` raises TypeError with numpy 2.4; Keras traces have such."""
        value = ops._get_inputs(context, node, expected=1)[0]
        if value.can_be_folded_to_const() and np.size(value.val) == 1 and np.ndim(value.val) > 0:
            constant = ops.mb.const(val=dtype(np.asarray(value.val).item()), name=node.name)
            context.add(constant, node.name)
        else:
            original(context, node, dtype, dtype_name)

    cast.nearfar = True  # type: ignore[attr-defined]
    ops._cast = cast
