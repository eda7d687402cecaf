"""What every writer of model files looks like, and how to find one.

Backends register in the entry-point group ``nearfar.formats`` (name: the format); the
built-in ones use the same group as anyone else's.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Protocol, runtime_checkable

from converters.jobs import Artifact, ConvertJob
from edge_runtime.contract.errors import BackendUnavailable, UnsupportedOperator
from edge_runtime.runtimes.base import Availability

__all__ = ["FormatBackend", "find_backend", "unsupported"]


@runtime_checkable
class FormatBackend(Protocol):
    """Writes one format. Importing its module and creating it imports no backend."""

    format: str
    suffix: str
    """Of the file or folder, with the dot."""

    def availability(self) -> Availability:
        """Whether the backend is installed; never raises, imports nothing heavy."""

    def convert(self, job: ConvertJob) -> Artifact:
        """Write the variant into ``job.out_dir`` as ``model<suffix>``.

        Runs in a child process that does nothing else. Raises ``UnsupportedOperator``,
        ``PrecisionRefused`` or another ``ConversionError``.
        """


def find_backend(format_name: str) -> FormatBackend:
    """The usable writer of a format. ``BackendUnavailable`` says what to install."""
    for point in entry_points(group="nearfar.formats", name=format_name):
        backend: FormatBackend = point.load()()
        state = backend.availability()
        if not state.available:
            raise BackendUnavailable(
                f"{format_name}: {state.reason}; install it with: {state.install}"
            )
        return backend
    raise BackendUnavailable(f"no converter is registered for format {format_name!r}")


def unsupported(format_name: str, error: Exception) -> UnsupportedOperator:
    """A converter's own exception as a typed one, with its first telling line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0][:300] if lines else type(error).__name__
    return UnsupportedOperator(
        f"{format_name} cannot express this model: {type(error).__name__}: {reason}. "
        "Replace the operator, or leave this format out of --to"
    )
