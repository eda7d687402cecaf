"""Read a decision log: bounded, checked, with the line's number in every complaint."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from edge_runtime.contract.errors import ConfigError, ContractError, LimitExceeded, MissingFile
from edge_runtime.log.entries import MAX_LINE_BYTES, LogEntry, PolicyRecord
from edge_runtime.log.lines import Line, Lost, PolicyLine, Resumed, decode_line

__all__ = ["LogFile", "Numbered", "read_log"]

MAX_LOG_BYTES: Final = 2**30
MAX_ENTRIES: Final = 1_000_000


class Numbered(msgspec.Struct, frozen=True):
    """An entry and the number of its line, from 1."""

    line: int
    entry: LogEntry


class LogFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a log's file holds."""

    entries: tuple[Numbered, ...]
    notices: tuple[str, ...]
    """What a reader should know: torn lines that were skipped, entries that were lost."""

    def find(self, *, request: str | None = None, line: int | None = None) -> Numbered:
        """One entry: by its request's id or the number of its line, else the last one.

        Raises ``ConfigError``.
        """
        if not self.entries:
            raise ConfigError("the log holds no request yet")
        if request is not None:
            for one in self.entries:
                if one.entry.request == request:
                    return one
            raise ConfigError(f"the log holds no request {request!r}: look for its id in the log")
        if line is not None:
            for one in self.entries:
                if one.line == line:
                    return one
            last = self.entries[-1].line
            raise ConfigError(f"line {line} of the log is no request; the last one is line {last}")
        return self.entries[-1]


def read_log(path: Path) -> LogFile:
    """Every request in the file, oldest first.

    The last line may be torn, by a crash or because it is being written now, and so may a
    line before a ``resumed`` one: these are skipped with a notice. Any other line that makes
    no sense is an error, since replaying around a gap would prove nothing.

    Raises:
        MissingFile: no such regular file.
        LimitExceeded: a file of more than 1 GiB, a line of more than 1 MiB, too many entries.
        ContractError: a line that is no entry, or of another version; it names the line.
    """
    entries: list[Numbered] = []
    notices: list[str] = []
    policies: dict[str, PolicyRecord] = {}
    torn: tuple[int, ContractError] | None = None
    for number, data, whole in _lines(path):
        try:
            line = _decode(data)
        except ContractError as error:
            if torn is not None:
                raise _at(path, *torn) from None
            torn = (number, error)
            if not whole:
                break
            continue
        if torn is not None:
            if not isinstance(line, Resumed):
                raise _at(path, *torn)
            notices.append(f"line {torn[0]} was torn by a crash and is skipped")
            torn = None
        if isinstance(line, PolicyLine):
            policies[line.id] = line.policy
        elif isinstance(line, Lost):
            notices.append(f"line {number}: {line.count} entries could not be written before it")
        elif not isinstance(line, Resumed):
            try:
                if line.policy_id not in policies:
                    raise ContractError("it names a policy that no line before it describes")
                entries.append(Numbered(number, line.resolve(policies[line.policy_id])))
            except ContractError as error:
                raise _at(path, number, error) from None
            if len(entries) > MAX_ENTRIES:
                raise LimitExceeded(f"{path} holds more than {MAX_ENTRIES} requests: split it")
    if torn is not None:
        if whole:
            raise _at(path, *torn)
        notices.append(f"line {torn[0]}, the last one, is torn and is skipped")
    return LogFile(entries=tuple(entries), notices=tuple(notices))


def _decode(data: bytes) -> Line:
    if len(data) > MAX_LINE_BYTES:
        raise ContractError(f"it has more than {MAX_LINE_BYTES} bytes")
    return decode_line(data)


def _at(path: Path, number: int, error: ContractError) -> ContractError:
    return ContractError(f"{path}, line {number}: {error.detail}")


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Number, content, and whether its newline is there; at most a line too long is read."""
    with _open(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_LOG_BYTES:
            raise LimitExceeded(f"{path} has more than {MAX_LOG_BYTES} bytes: split it")
        number = 0
        while data := file.readline(MAX_LINE_BYTES + 2):
            number += 1
            whole = data.endswith(b"\n")
            if not whole and len(data) > MAX_LINE_BYTES + 1:
                raise LimitExceeded(
                    f"{path}, line {number} has more than {MAX_LINE_BYTES} bytes: it is no "
                    "decision log"
                )
            yield number, data.rstrip(b"\n"), whole


def _open(path: Path) -> BinaryIO:
    try:
        # Without O_NONBLOCK a named pipe would wait here for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise MissingFile(f"cannot read {path}: {error.strerror}: name a decision log") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise MissingFile(f"{path} is not a regular file: name a decision log")
    return open(descriptor, "rb")  # noqa: PTH123  # a descriptor; the caller closes it
