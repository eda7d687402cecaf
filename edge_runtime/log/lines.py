"""One line of the log's file: encoded so that every number comes back bit for bit."""

from __future__ import annotations

import hashlib
import math
from typing import Any, Final, Literal, TypeVar

import msgspec

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.manifest import canonical_json
from edge_runtime.log.entries import SCHEMA_VERSION, LogEntry, PolicyRecord

__all__ = ["Line", "Lost", "PolicyLine", "RequestLine", "Resumed", "decode_line", "encode"]

_NOT_FINITE: Final = (b'"inf"', b'"-inf"', b'"nan"')


class PolicyLine(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="policy"):
    """Named by ``id`` in the requests that follow."""

    schema_version: Literal[1] = 1
    id: str
    policy: PolicyRecord

    @classmethod
    def of(cls, policy: PolicyRecord) -> PolicyLine:
        """Its id is the beginning of its digest."""
        return cls(id=hashlib.sha256(canonical_json(policy)).hexdigest()[:16], policy=policy)


class Resumed(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="resumed"):
    """The line before was torn when its writer died."""

    schema_version: Literal[1] = 1


class Lost(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="lost"):
    """So many entries could not be written before this line."""

    schema_version: Literal[1] = 1
    count: int


class RequestLine(msgspec.Struct, frozen=True, kw_only=True):
    """An entry whose policy is named by its id."""

    policy_id: str
    raw: dict[str, Any]
    strict: bool

    def resolve(self, policy: PolicyRecord) -> LogEntry:
        """The whole entry. Raises ``ContractError``."""
        raw = {**self.raw, "policy": msgspec.to_builtins(policy)}
        return _convert(raw, LogEntry, strict=self.strict)


Line = PolicyLine | RequestLine | Resumed | Lost


def encode(line: PolicyLine | Resumed | Lost | LogEntry) -> bytes:
    """One line with its newline. Infinities and NaN, which JSON lacks, become strings."""
    value = msgspec.to_builtins(line)
    if isinstance(line, LogEntry):
        value = {"kind": "request", **value, "policy": PolicyLine.of(line.policy).id}
    return msgspec.json.encode(_finite(value)) + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def decode_line(data: bytes) -> Line:
    """The inverse. Raises ``ContractError`` with what is wrong, without the line's number."""
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ContractError(f"it is not JSON ({error})") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("kind"), str):
        raise ContractError("it is no entry of a nearfar decision log")
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ContractError(
            f"its schema version is {version!r}, this nearfar reads {SCHEMA_VERSION}: "
            "read it with the version that wrote it"
        )
    strict = not any(mark in data for mark in _NOT_FINITE)
    kind = raw["kind"]
    if kind in _KINDS:
        return _convert(raw, _KINDS[kind], strict=strict)
    if kind != "request":
        raise ContractError(f"nothing is known of its kind, {kind[:40]!r}")
    del raw["kind"]
    named = raw.pop("policy", None)
    if not isinstance(named, str):
        raise ContractError("it names no policy")
    return RequestLine(policy_id=named, raw=raw, strict=strict)


_KINDS: Final[dict[str, type[PolicyLine] | type[Resumed] | type[Lost]]] = {
    "policy": PolicyLine,
    "resumed": Resumed,
    "lost": Lost,
}
_T = TypeVar("_T")


def _convert(raw: dict[str, Any], kind: type[_T], *, strict: bool) -> _T:
    """``raw`` as ``kind``, and nothing in it that ``kind`` does not know."""
    try:
        value = msgspec.convert(raw, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise ContractError(f"it breaks its schema ({error})") from None
    unknown = _unknown(raw, msgspec.to_builtins(value))
    if unknown is not None:
        raise ContractError(
            f"nothing is known of its field {unknown[:200]!r}: read it with the nearfar that "
            "wrote it"
        )
    return value


def _unknown(raw: Any, known: Any, path: str = "") -> str | None:
    """The first key of ``raw`` that ``known`` does not have."""
    if isinstance(raw, dict) and isinstance(known, dict):
        for key, item in raw.items():
            if key not in known:
                return f"{path}{key}"
            found = _unknown(item, known[key], f"{path}{key}.")
            if found is not None:
                return found
    if isinstance(raw, list) and isinstance(known, list | tuple):
        for number, (item, other) in enumerate(zip(raw, known, strict=False)):
            found = _unknown(item, other, f"{path}{number}.")
            if found is not None:
                return found
    return None
