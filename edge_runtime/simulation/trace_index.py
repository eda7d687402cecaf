"""``index.csv``: the traces of a folder by name, class, radio and files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Final

import msgspec

from edge_runtime.contract.errors import ConfigError, NearfarError
from edge_runtime.contract.files import read_bounded

__all__ = ["INDEX_NAME", "IndexRow", "read_index"]

INDEX_NAME: Final = "index.csv"
MAX_INDEX_BYTES: Final = 4 * 2**20
MAX_INDEX_ROWS: Final = 10_000
_MAX_CELL_CHARS: Final = 240
_NEEDED: Final = ("name", "class", "radio", "uplink", "rtt")


class IndexRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row. Paths are relative to the index; nothing is checked but length and print."""

    line: int
    name: str
    group: str
    radio: str
    uplink: str
    rtt: str


def read_index(root: Path) -> list[IndexRow]:
    """The rows of a folder's index. ``ConfigError`` says what is wrong with it."""
    path = root / INDEX_NAME
    if path.is_symlink():
        raise ConfigError(f"{path} is a link: copy the file")
    try:
        text = read_bounded(path, MAX_INDEX_BYTES).decode("utf-8-sig")
        rows = csv.reader(text.splitlines(), skipinitialspace=True)
        header = [cell.strip().lower() for cell in next(rows, [])]
        missing = [name for name in _NEEDED if name not in header]
        if missing:
            raise ConfigError(
                f"{path} has no column {', '.join(missing)}: its header must name "
                f"{', '.join(_NEEDED)}"
            )
        found: list[IndexRow] = []
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if len(found) >= MAX_INDEX_ROWS:
                raise ConfigError(f"{path} has more than {MAX_INDEX_ROWS} rows")
            found.append(_row(path, rows.line_num, header, row))
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8") from None
    except csv.Error as error:
        raise ConfigError(f"{path} is no CSV file: {error}") from None
    except NearfarError as error:
        raise ConfigError(error.detail) from None
    return found


def _row(path: Path, line: int, header: list[str], row: list[str]) -> IndexRow:
    if len(row) != len(header):
        raise ConfigError(f"{path} line {line} has {len(row)} cells, its header {len(header)}")
    cells = {name: cell.strip() for name, cell in zip(header, row, strict=True)}
    for name in _NEEDED:
        if len(cells[name]) > _MAX_CELL_CHARS or not cells[name].isprintable():
            raise ConfigError(f"{path} line {line}: {name} must be short and printable")
    if not cells["name"] or not cells["uplink"]:
        raise ConfigError(f"{path} line {line} needs a name and an uplink file")
    return IndexRow(
        line=line,
        name=cells["name"],
        group=cells["class"],
        radio=cells["radio"],
        uplink=cells["uplink"],
        rtt=cells["rtt"],
    )
