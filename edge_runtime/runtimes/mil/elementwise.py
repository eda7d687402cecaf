"""MIL operators that work on each number alone: arithmetic, comparison, activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from edge_runtime.runtimes.mil.registry import Function, Tensor

__all__ = ["OPERATORS"]


def _unary(function: Callable[[Tensor], Tensor]) -> Function:
    def run(x: Tensor) -> Tensor:
        return function(x)

    return run


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
    def run(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return run


def _round(x: Tensor) -> Tensor:
    return torch.round(x)  # halves to even, as numpy, which coremltools folds constants with


def _divide(x: Tensor, y: Tensor) -> Tensor:
    # Integers divide to integers in MIL.
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(x, alpha, beta)


def _threshold(x: Tensor, alpha: float) -> Tensor:
    return torch.clamp(x, min=alpha)


def _sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp_(torch.mul(x, alpha).add_(beta), 0.0, 1.0)


def _thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= alpha, x, 0.0)


def _clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp_(F.leaky_relu(x, alpha), max=beta)


def _leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return F.leaky_relu(x, alpha)


def _elu(x: Tensor, alpha: float) -> Tensor:
    return F.elu(x, alpha)


def _prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return F.prelu(x, alpha)


def _linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x * alpha + beta


def _scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(x * beta)


def _softplus(x: Tensor) -> Tensor:
    # F.softplus turns linear above 20; this form is exact everywhere.
    return torch.relu(x) + torch.log1p(torch.exp(-torch.abs(x)))


def _softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    shape = [1, -1] + [1] * (x.dim() - 2)
    return alpha.reshape(shape) * _softplus(x * beta.reshape(shape))


def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise ValueError(f"mode {mode!r}")


def _rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


def _inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return torch.reciprocal(x + epsilon)


def _log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


_CASTS = {
    "fp16": torch.float32,  # the interpreter rounds
    "fp32": torch.float32,
    "int32": torch.int32,
    "int16": torch.int32,  # the interpreter wraps
    "uint16": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def _cast(x: Tensor, dtype: str) -> Tensor:
    return x.to(_CASTS[dtype])  # towards zero, as numpy's astype


def _select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond.bool(), a, b)


OPERATORS: dict[str, Function] = {
    **{
        name: _binary(function)
        for name, function in {
            "add": torch.add,
            "equal": torch.eq,
            "floor_div": lambda x, y: torch.div(x, y, rounding_mode="floor"),
            "greater": torch.gt,
            "greater_equal": torch.ge,
            "less": torch.lt,
            "less_equal": torch.le,
            "logical_and": torch.logical_and,
            "logical_or": torch.logical_or,
            "logical_xor": torch.logical_xor,
            "maximum": torch.maximum,
            "minimum": torch.minimum,
            "mod": torch.remainder,
            "mul": torch.mul,
            "not_equal": torch.ne,
            "pow": torch.pow,
            "real_div": _divide,
            "sub": torch.sub,
        }.items()
    },
    **{
        name: _unary(function)
        for name, function in {
            "abs": torch.abs,
            "acos": torch.acos,
            "asin": torch.asin,
            "atan": torch.atan,
            "atanh": torch.atanh,
            "ceil": torch.ceil,
            "cos": torch.cos,
            "cosh": torch.cosh,
            "erf": torch.erf,
            "exp": torch.exp,
            "exp2": torch.exp2,
            "floor": torch.floor,
            "identity": lambda x: x,
            "logical_not": torch.logical_not,
            "relu": torch.relu,
            "relu6": F.relu6,
            "round": _round,
            "sigmoid": torch.sigmoid,
            "sign": torch.sign,
            "silu": F.silu,
            "sin": torch.sin,
            "sinh": torch.sinh,
            "softplus": _softplus,
            "softsign": F.softsign,
            "sqrt": torch.sqrt,
            "square": torch.square,
            "tan": torch.tan,
            "tanh": torch.tanh,
        }.items()
    },
    "cast": _cast,
    "clamped_relu": _clamped_relu,
    "clip": _clip,
    "elu": _elu,
    "gelu": _gelu,
    "inverse": _inverse,
    "leaky_relu": _leaky_relu,
    "linear_activation": _linear_activation,
    "log": _log,
    "prelu": _prelu,
    "rsqrt": _rsqrt,
    "scaled_tanh": _scaled_tanh,
    "select": _select,
    "sigmoid_hard": _sigmoid_hard,
    "softplus_parametric": _softplus_parametric,
    "threshold": _threshold,
    "thresholded_relu": _thresholded_relu,
}
