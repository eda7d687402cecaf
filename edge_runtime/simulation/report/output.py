"""The JSON document, the text in the terminal, and writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.contract.errors import ConfigError
from edge_runtime.simulation.report.cells import Page
from edge_runtime.simulation.scores import DEFINITIONS, cell_document
from edge_runtime.simulation.terminal import cells_text, scores_text

__all__ = ["document", "summary", "write_text"]


def document(page: Page) -> dict[str, Any]:
    """What ``--json`` writes.

    With one cell its figures are at the top level (``cell``, ``policies``, ...); with several
    they are under ``cells``, in order.
    """
    cells = [cell_document(cell.result, cell.scores) for cell in page.cells]
    for cell in cells[1:]:
        if cell["constants"] == cells[0]["constants"]:
            del cell["constants"]
    found: dict[str, Any] = dict(cells[0]) if len(cells) == 1 else {"cells": cells}
    return found | {
        "traces": {
            "used": [
                {"class": trace.group, "radio": trace.radio, **msgspec.to_builtins(source)}
                for trace, source in zip(page.folder.traces, page.folder.sources, strict=True)
            ],
            "skipped": msgspec.to_builtins(page.folder.skipped),
        },
        "definitions": DEFINITIONS,
        "machine": page.machine,
        "run_s": round(page.run_s, 1),
    }


def summary(page: Page) -> str:
    """Each cell's table; with several, gain by cell at the end."""
    tables = [scores_text(cell.name, cell.scores) for cell in page.cells]
    if len(page.cells) > 1:
        named = [(cell.name, cell.scores) for cell in page.cells]
        tables.append(cells_text("gain capture by cell, %", named))
    return "\n\n".join(tables)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. ``ConfigError`` when it cannot be written."""
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.absolute().parent, prefix=".", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
