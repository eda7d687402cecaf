"""A policy written down by the arguments it was made with, and made again from them."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec

from edge_runtime.contract.errors import ConfigError
from edge_runtime.gain.curve import GainCurve
from edge_runtime.log.entries import PolicyRecord
from edge_runtime.policies.adaptive import GainPrior
from edge_runtime.policies.base import Policy
from edge_runtime.policies.registry import find_policy

__all__ = ["describe_policy", "make_policy"]


def describe_policy(policy: Policy) -> PolicyRecord:
    """Its name, and each argument of its ``__init__`` that it keeps as an attribute.

    An attribute is looked up by the argument's name, with or without a leading underscore.
    Never raises: a policy may be anybody's.
    """
    parameters: dict[str, Any] = {}
    complete = True
    try:
        for name in _arguments(type(policy)):
            parameters[name] = _written(_kept(policy, name))
    except Exception:  # no signature, an attribute that raises, a value without a JSON form
        complete = False
    return PolicyRecord(name=policy.name, parameters=parameters, complete=complete)


def _kept(policy: Policy, name: str) -> Any:
    """The attribute of an argument; ``inspect.Parameter.empty``: there is none."""
    return getattr(policy, name, getattr(policy, f"_{name}", inspect.Parameter.empty))


def _arguments(kind: type) -> list[str]:
    """Names of the arguments of ``__init__``; ``*`` for what takes any."""
    if issubclass(kind, msgspec.Struct):
        return list(kind.__struct_fields__)
    if kind.__init__ is object.__init__:
        return []
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    flexible = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [("*" if one.kind in flexible else one.name) for one in parameters]


def _written(value: Any) -> Any:
    """As JSON values. ``TypeError``: it has no such form."""
    if isinstance(value, msgspec.Struct):
        return {"type": type(value).__name__, **msgspec.json.decode(msgspec.json.encode(value))}
    if value is inspect.Parameter.empty:
        raise TypeError
    return msgspec.json.decode(msgspec.json.encode(value))


def make_policy(record: PolicyRecord) -> Policy:
    """A policy that decides as the recorded one did.

    Only what is registered is made, from numbers and the structs that the registered policy
    itself takes: a log names no code. Raises ``ConfigError`` when that is not enough.
    """
    hint = "pass --policy to see what another one would have done"
    default = find_policy(record.name)
    own = describe_policy(default)
    if not record.complete:
        raise ConfigError(f"an argument of {record.name} could not be written down: {hint}")
    if own.parameters == record.parameters:
        return default
    kinds: dict[str, type[msgspec.Struct]] = {"GainCurve": GainCurve, "GainPrior": GainPrior}
    for name in own.parameters:
        value = _kept(default, name)
        if isinstance(value, msgspec.Struct):
            kinds[type(value).__name__] = type(value)
    try:
        arguments = {
            name: _read(value, kinds, _kept(default, name))
            for name, value in record.parameters.items()
        }
        made = type(default)(**arguments)
    except (TypeError, ValueError, KeyError, msgspec.ValidationError) as error:
        raise ConfigError(
            f"the policy {record.name} of this log cannot be made again ({error}): {hint}"
        ) from None
    if not isinstance(made, Policy) or describe_policy(made).parameters != record.parameters:
        raise ConfigError(f"the policy {record.name} of this log cannot be made again: {hint}")
    return made


def _read(value: Any, kinds: dict[str, type[msgspec.Struct]], default: Any) -> Any:
    if isinstance(value, dict) and "type" in value:
        fields = {name: item for name, item in value.items() if name != "type"}
        return msgspec.convert(fields, kinds[value["type"]])
    if isinstance(default, msgspec.Struct):
        raise TypeError(f"a {type(default).__name__} was expected")
    if isinstance(value, list) and isinstance(default, tuple):
        return tuple(value)
    return value
