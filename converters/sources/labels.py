"""Read the file that names the classes."""

from __future__ import annotations

from pathlib import Path

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError

__all__ = ["is_background", "read_labels_file"]


def read_labels_file(path: Path, *, minimum: int = 2) -> tuple[str, ...]:
    """One class name a line, UTF-8, at least ``minimum``. Raises ``ConfigError``."""
    try:
        if path.stat().st_size > limits.MAX_LABELS_BYTES:
            raise ConfigError(f"{path} is larger than {limits.MAX_LABELS_BYTES} bytes")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read labels file {path}: {error}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    if not minimum <= len(lines) <= limits.MAX_LABELS:
        raise ConfigError(
            f"{path} has {len(lines)} labels; {minimum} to {limits.MAX_LABELS} are needed"
        )
    for number, line in enumerate(lines, 1):
        if not line.strip() or len(line) > limits.MAX_LABEL_CHARS:
            raise ConfigError(f"{path}, line {number}: a label is empty or too long")
    return tuple(lines)


def is_background(label: str) -> bool:
    """Whether a class name means "nothing here", as COCO label files begin."""
    return label.strip().strip("_").lower() == "background"
