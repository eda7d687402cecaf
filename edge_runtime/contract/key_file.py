"""An API key in a file: the way a key gets onto a command line without being seen there."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.files import read_bounded

__all__ = ["read_key_file"]

_MAX_KEY_FILE_BYTES: Final = 4096


def read_key_file(path: Path) -> str:
    """The key on the file's only line.

    Raises ``ConfigError``, or ``MissingFile`` and ``LimitExceeded`` as ``read_bounded``.
    """
    try:
        key = read_bounded(path, _MAX_KEY_FILE_BYTES).decode("ascii").strip()
    except UnicodeDecodeError:
        key = ""
    if not key or len(key.split()) != 1:
        raise ConfigError(f"{path} must hold one API key and nothing else")
    return key
