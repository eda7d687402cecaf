"""How a MIL operator's arguments become those of its Python function.

Each operator is one function with typed keyword arguments named as in MIL. The annotation
says what an argument is: ``Tensor`` is data; ``Ints``, ``int``, ``float``, ``bool``, ``str``
and ``Bools`` are attributes, turned into plain Python once, when the program is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch

from edge_runtime.contract.errors import ModelLoadError

__all__ = ["Bools", "Function", "Ints", "Operator", "Tensor", "as_tensor"]

Tensor: TypeAlias = torch.Tensor
Ints: TypeAlias = list[int]
Bools: TypeAlias = list[bool]
Function: TypeAlias = Callable[..., Any]
"""Gives one tensor, or a tuple of them."""


def as_tensor(value: Any) -> torch.Tensor:
    """A constant as a tensor of ours: float32 for every float, int32 for 16-bit integers."""
    if isinstance(value, torch.Tensor):
        return value
    array = np.asarray(value)
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    elif array.dtype in (np.int16, np.uint16, np.int64, np.uint32, np.uint64):
        array = array.astype(np.int32)
    elif array.dtype.kind not in "iub":
        raise TypeError(f"a constant of type {array.dtype} is no tensor")
    return torch.from_numpy(np.array(array))


def _plain(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value


def _ints(value: Any) -> list[int]:
    return [int(v) for v in np.asarray(_plain(value)).reshape(-1)]


def _bools(value: Any) -> list[bool]:
    return [bool(v) for v in np.asarray(_plain(value)).reshape(-1)]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "Tensor": as_tensor,
    "Ints": _ints,
    "Bools": _bools,
    "int": lambda value: int(np.asarray(_plain(value)).item()),
    "float": lambda value: float(np.asarray(_plain(value)).item()),
    "bool": lambda value: bool(np.asarray(_plain(value)).item()),
    "str": _text,
    "list[Tensor]": lambda value: [as_tensor(v) for v in value],
    "Any": lambda value: value,
}


class Operator:
    """One function and what each of its arguments is."""

    def __init__(
        self, name: str, function: Function, ignored: frozenset[str] = frozenset()
    ) -> None:
        self.name = name
        self.function = function
        self.ignored = ignored
        """Arguments without effect on the answer here."""
        self._converters: dict[str, Callable[[Any], Any]] = {}
        self._required: set[str] = set()
        for parameter in inspect.signature(function).parameters.values():
            kind = str(parameter.annotation).removesuffix(" | None")
            self._converters[parameter.name] = _CONVERTERS[kind]
            if parameter.default is inspect.Parameter.empty:
                self._required.add(parameter.name)

    def converter(self, argument: str) -> Callable[[Any], Any]:
        """What makes a value fit ``argument``. Raises ``ModelLoadError`` if unknown."""
        converter = self._converters.get(argument)
        if converter is None:
            raise ModelLoadError(f"MIL operator {self.name}: argument {argument!r} is unknown here")
        return converter

    def check(self, given: Mapping[str, Any]) -> None:
        """Raise ``ModelLoadError`` when a required argument is missing."""
        missing = sorted(self._required - set(given))
        if missing:
            raise ModelLoadError(f"MIL operator {self.name}: {', '.join(missing)} is missing")

    def __call__(self, **arguments: Any) -> Any:
        """Run once, with arguments as a program holds them."""
        self.check(arguments)
        return self.function(
            **{
                name: self.converter(name)(value)
                for name, value in arguments.items()
                if value is not None and name not in self.ignored
            }
        )
