"""Read a folder of recorded uplinks: by its ``index.csv``, or by what its files hold.

A downlink's rate is never used as an uplink's, and a file that does not say whose rate it
holds is used only when the caller says so. What was not used is reported with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from edge_runtime.contract.errors import (
    ConfigError,
    ContractError,
    LimitExceeded,
    NearfarError,
    UnsafePath,
)
from edge_runtime.contract.files import read_bounded
from edge_runtime.simulation.trace_formats import MAX_FILE_BYTES, Recording, read_recording
from edge_runtime.simulation.trace_index import INDEX_NAME, IndexRow, read_index
from edge_runtime.simulation.trace_names import (
    DATA_SUFFIXES,
    Kind,
    Radio,
    find_partner,
    path_direction,
    path_kind,
    path_radio,
    radio_named,
)
from edge_runtime.simulation.trace_series import FloatArray, check_rtt, usable_runs

__all__ = [
    "RATE_UNITS",
    "Skipped",
    "Trace",
    "TraceFolder",
    "TraceSource",
    "read_traces",
]

RATE_UNITS: Final = {"mbps": 1.0, "kbps": 1e-3, "bps": 1e-6, "bytes": 8e-6}
"""Units that ``--rate-unit`` names, in Mbit/s; ``bytes`` are bytes per second."""
MAX_FILES: Final = 10_000
MAX_TRACES: Final = 2_000
MAX_TOTAL_BINS: Final = 50_000_000
_MAX_NAME_CHARS: Final = 120
_MAX_REASONS: Final = 3
_UNSTATED: Final = (
    "it does not say whether its rate is an uplink's: put 'uplink' into its name or header, or "
    "pass --assume-uplink"
)
_GROUPS: Final[dict[Radio, str]] = {"3g": "3G", "lte": "LTE", "5g": "5G", "wifi": "WiFi"}


class Trace(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One recorded mobile uplink, and the round trips of a link of its kind."""

    name: str
    """Unique within a folder."""
    group: str
    """The class it is reported under: an index's ``class``, else its radio."""
    radio: Radio
    """Whose promotion, tail and power constants apply."""
    uplink_mbps: FloatArray
    """float64 [bins], capacity of each 100 ms in Mbit/s; finite, >= 0, not all 0."""
    rtt_ms: FloatArray | None
    """float64 [replies], one round trip per 200 ms, in ms; None: drawn by radio."""


class TraceSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where a trace came from, and how it was read."""

    name: str
    file: str
    format: str
    direction: str
    """What says that its rate is an uplink's."""
    rtt: str | None
    """File of its round trips."""
    seconds: float
    median_mbps: float
    notes: tuple[str, ...] = ()


class Skipped(msgspec.Struct, frozen=True, kw_only=True):
    """A file, or a row of an index, that was not used."""

    path: str
    reason: str


class TraceFolder(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a folder holds."""

    traces: tuple[Trace, ...]
    skipped: tuple[Skipped, ...]
    sources: tuple[TraceSource, ...] = ()
    """One per trace, in the same order."""


class _FolderTooLarge(LimitExceeded):
    """All traces together are too much."""


class _File(msgspec.Struct, kw_only=True, eq=False):
    path: str
    recording: Recording
    used: bool = False


def read_traces(
    folder: Path, *, assume_uplink: bool = False, rate_unit: str | None = None
) -> TraceFolder:
    """Every usable uplink of a folder, in a fixed order, and what was skipped and why.

    With an ``index.csv`` (columns name, class, radio, uplink and rtt), the files it names
    and no others; without, every file below the folder but hidden ones, recognized by its
    content. ``assume_uplink``: take rates whose direction is not stated as an uplink's.
    ``rate_unit``: a key of ``RATE_UNITS`` for rates that name no unit.

    Raises ``ConfigError`` (no such folder, an index without its columns, nothing usable)
    and ``LimitExceeded`` (too many files or values in all).
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: pass one with uplink traces")
    if rate_unit is not None and rate_unit not in RATE_UNITS:
        raise ConfigError(f"no rate unit {rate_unit!r}: choose one of {', '.join(RATE_UNITS)}")
    factor = None if rate_unit is None else RATE_UNITS[rate_unit]
    reader = _Reader(folder.resolve(), assume_uplink, factor)
    if (folder / INDEX_NAME).exists():
        reader.read_indexed()
    else:
        reader.read_detected()
    found = TraceFolder(
        traces=tuple(reader.traces), skipped=tuple(reader.skipped), sources=tuple(reader.sources)
    )
    if not found.traces:
        raise ConfigError(f"no usable uplink trace in {folder}: {_main_reasons(found.skipped)}")
    return found


def _main_reasons(skipped: Sequence[Skipped]) -> str:
    """The three most frequent reasons, each with a file."""
    files: dict[str, list[str]] = {}
    for found in skipped:
        files.setdefault(found.reason, []).append(found.path)
    most = sorted(files.items(), key=lambda item: -len(item[1]))[:_MAX_REASONS]
    texts = [
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {reason}"
        for reason, paths in most
    ]
    return "; ".join(texts) or "it is empty"


class _Reader:
    """One reading of one folder."""

    def __init__(self, root: Path, assume_uplink: bool, factor: float | None) -> None:
        self.root = root
        self.traces: list[Trace] = []
        self.sources: list[TraceSource] = []
        self.skipped: list[Skipped] = []
        self._assume_uplink = assume_uplink
        self._factor = factor
        self._names: set[str] = set()
        self._bins = 0

    # By content ---------------------------------------------------------------------

    def read_detected(self) -> None:
        rates: list[_File] = []
        rtts: list[_File] = []
        for path in self._walk():
            try:
                hint = path_kind(path)
                recording = self._read(path, hint)
                if not recording.uplink_runs and recording.rtt_ms is not None:
                    check_rtt(recording.rtt_ms)
            except NearfarError as error:
                self._skip(path, error.detail)
                continue
            file = _File(path=path, recording=recording)
            (rates if recording.uplink_runs else rtts).append(file)
        for file in rates:
            reason, direction = self._direction(file)
            if reason is not None:
                self._skip(file.path, reason)
                continue
            try:
                self._add_detected(file, direction, rtts)
            except _FolderTooLarge:
                raise
            except ContractError as error:
                self._skip(file.path, error.detail)
        for file in rtts:
            if not file.used:
                self._skip(file.path, "its round trips belong to no uplink that was used")

    def _direction(self, file: _File) -> tuple[str | None, str]:
        """Why the rate is no uplink's, or what says that it is."""
        by_path, by_content = path_direction(file.path), file.recording.direction
        if "downlink" in (by_path, by_content):
            return "a downlink's rate is never an uplink's", ""
        if by_content == "uplink":
            return None, "its columns"
        if by_path == "uplink":
            return None, "its name"
        if self._assume_uplink:
            return None, "--assume-uplink"
        return _UNSTATED, ""

    def _add_detected(self, file: _File, direction: str, rtts: list[_File]) -> None:
        named = path_radio(file.path)
        radio: Radio = named or "lte"
        notes = list(file.recording.notes)
        if named is None:
            notes.append("no radio named: LTE assumed")
        runs, short = usable_runs(file.recording.uplink_runs)
        if short:
            notes.append(f"{short} runs not used")
        rtt_ms, rtt_file = file.recording.rtt_ms, file.path
        if rtt_ms is None:
            by_path = {other.path: other for other in rtts}
            rtt_file = find_partner(file.path, list(by_path), named) or ""
            if rtt_file:
                rtt_ms = by_path[rtt_file].recording.rtt_ms
                by_path[rtt_file].used = True
        self._add(
            runs,
            name=_plain_name(file.path),
            group=_GROUPS[radio],
            radio=radio,
            rtt_ms=rtt_ms,
            source=(file.path, file.recording.format, direction, rtt_file or None, notes),
        )

    # By an index --------------------------------------------------------------------

    def read_indexed(self) -> None:
        named: set[str] = set()
        for row in read_index(self.root):
            named |= {row.uplink, row.rtt}
            try:
                self._add_indexed(row)
            except _FolderTooLarge:
                raise
            except NearfarError as error:
                self._skip(f"{INDEX_NAME} line {row.line} ({row.uplink})", error.detail)
        others = sum(path not in named and path != INDEX_NAME for path in self._walk(quiet=True))
        if others:
            self._skip(f"{others} other files", f"{INDEX_NAME} does not name them")

    def _add_indexed(self, row: IndexRow) -> None:
        radio = radio_named(row.radio)
        if radio is None:
            raise ContractError(f"radio {row.radio!r} is none of {', '.join(_GROUPS)}")
        if row.name in self._names:
            raise ContractError(f"the name {row.name!r} is there already")
        recording = self._read(row.uplink, "rate")
        if not recording.uplink_runs:
            raise ContractError("the file holds round trips, no rates")
        if "downlink" in (recording.direction, path_direction(row.uplink)):
            raise ContractError("a downlink's rate is never an uplink's")
        runs, short = usable_runs(recording.uplink_runs)
        notes = [*recording.notes, *([f"{short} runs not used"] if short else [])]
        rtt_ms = recording.rtt_ms
        if row.rtt:
            found = self._read(row.rtt, "rtt").rtt_ms
            if found is None:
                raise ContractError(f"{row.rtt} holds no round trips")
            try:
                rtt_ms = check_rtt(found)
            except ContractError as error:
                raise ContractError(f"{row.rtt}: {error.detail}") from None
        self._add(
            runs,
            name=row.name,
            group=row.group or _GROUPS[radio],
            radio=radio,
            rtt_ms=rtt_ms,
            source=(row.uplink, recording.format, INDEX_NAME, row.rtt or None, notes),
        )

    # Both ---------------------------------------------------------------------------

    def _walk(self, *, quiet: bool = False) -> list[str]:
        """Relative paths of the files below the root, sorted; hidden ones left out."""
        found: list[str] = []

        def unreadable(error: OSError) -> None:
            path = _relative(Path(error.filename), self.root)
            self._skip(path, f"the folder cannot be read: {error.strerror}")

        onerror = None if quiet else unreadable
        for place, folders, files in os.walk(self.root, onerror=onerror, followlinks=False):
            here = Path(place)
            for name in sorted(folders):
                if (here / name).is_symlink() and not quiet:
                    self._skip(
                        _relative(here / name, self.root), "links to folders are not followed"
                    )
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [
                _relative(here / name, self.root) for name in files if not name.startswith(".")
            ]
            if len(found) > MAX_FILES:
                raise LimitExceeded(
                    f"{self.root} holds more than {MAX_FILES} files: pass a folder of traces"
                )
        return sorted(found)

    def _read(self, path: str, hint: Kind | None) -> Recording:
        """Read a file that lies below the root, wherever its links lead."""
        if "\\" in path or "\0" in path or path.startswith("/") or ".." in path.split("/"):
            raise UnsafePath(f"{path!r} leaves the folder")
        target = self.root / path
        try:
            inside = target.resolve(strict=True).is_relative_to(self.root)
        except (OSError, RuntimeError):  # RuntimeError: links in a circle
            raise ContractError(f"{path}: there is no such file") from None
        if not inside:
            raise UnsafePath("it is a link that leaves the folder: copy the file")
        return read_recording(
            read_bounded(target, MAX_FILE_BYTES), hint=hint, rate_factor=self._factor
        )

    def _add(
        self,
        runs: list[FloatArray],
        *,
        name: str,
        group: str,
        radio: Radio,
        rtt_ms: FloatArray | None,
        source: tuple[str, str, str, str | None, list[str]],
    ) -> None:
        file, kind, direction, rtt_file, notes = source
        for number, bins in enumerate(runs, 1):
            own = self._unique(name if len(runs) == 1 else f"{name}#{number}", file)
            self._bins += bins.size + (0 if rtt_ms is None else rtt_ms.size)
            if self._bins > MAX_TOTAL_BINS or len(self.traces) >= MAX_TRACES:
                raise _FolderTooLarge(
                    f"more than {MAX_TRACES} traces or {MAX_TOTAL_BINS} values in all: "
                    "pass fewer files"
                )
            self.traces.append(
                Trace(name=own, group=group, radio=radio, uplink_mbps=bins, rtt_ms=rtt_ms)
            )
            self.sources.append(
                TraceSource(
                    name=own,
                    file=printable(file),
                    format=kind,
                    direction=direction,
                    rtt=None if rtt_file is None else printable(rtt_file),
                    seconds=bins.size / 10,
                    median_mbps=round(float(np.median(bins)), 3),
                    notes=tuple(notes),
                )
            )

    def _unique(self, name: str, file: str) -> str:
        own, number = name, 1
        while own in self._names:
            number += 1
            own = f"{printable(file)[-_MAX_NAME_CHARS:]} ({number})"
        self._names.add(own)
        return own

    def _skip(self, path: str, reason: str) -> None:
        self.skipped.append(Skipped(path=printable(path), reason=printable(reason)))


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _plain_name(path: str) -> str:
    """A path without an ending that says nothing."""
    stem, dot, suffix = path.rpartition(".")
    name = stem if dot and stem and suffix.lower() in DATA_SUFFIXES else path
    return printable(name)[-_MAX_NAME_CHARS:]


def printable(text: str) -> str:
    """A text that a terminal shows as it is."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
