"""Three gaps in coremltools 9's PyTorch front end, filled from outside."""

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
    """Teach the PyTorch front end aliases, one-element arrays and whole quotients.

    Safe to call again.
    """
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
    _divide_integers(ops, REGISTRY)


def _divide_integers(ops: Any, registry: Any) -> None:
    """``torch.div(int, int, rounding_mode="floor")`` is an integer; coremltools makes fp32."""
    from coremltools.converters.mil.mil import types

    original = registry.get_func("div")

    def div(context: Any, node: Any) -> None:
        both = [context[name] for name in node.inputs[:2]]
        original(context, node)
        result = context[node.name]
        if all(types.is_int(var.dtype) for var in both) and _rounds(context, node):
            # Quotients are exact in fp32 up to 2^24, more than there are boxes times classes.
            whole = ops.mb.cast(x=result, dtype="int32", name=f"{node.name}_whole")
            context.add(whole, node.name, override=True)

    registry.set_func_by_name(div, "div")


def _rounds(context: Any, node: Any) -> bool:
    names = list(node.inputs[2:3]) + list((getattr(node, "kwinputs", None) or {}).values())
    for name in names:
        key = name[0] if isinstance(name, list | tuple) else name
        var = context[key] if isinstance(key, str) and key in context else None
        if isinstance(getattr(var, "val", None), str):
            return True
    return False
