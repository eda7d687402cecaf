"""Look into a zip archive from outside before any library reads it.

Libraries differ in where they look for a zip's table of contents, and in which of two
members of one name they take. A file that shows one of them something harmless and the
other something else is refused here: only one reading must be possible.
"""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final

from edge_runtime.contract import limits
from edge_runtime.contract.errors import NearfarError

__all__ = ["check_zip", "check_zip_stream"]

_MAX_MEMBERS: Final = 100_000
_MAX_RATIO: Final = 200
_NAME: Final = re.compile(r"[\x20-\x7e]{1,1024}")
_END: Final = struct.Struct("<4s4H2LH")
_LOCATOR: Final = struct.Struct("<4sLQL")
_END_64: Final = struct.Struct("<4sQ2H2L4Q")


def check_zip(path: Path, what: str, error: type[NearfarError]) -> list[zipfile.ZipInfo]:
    """The members of ``path``, found bounded in number, size and names.

    ``what``: what the file should be, for the message. Raises ``error`` for something that
    is no zip or can be read in two ways, grows beyond ``limits.MAX_BUNDLE_FILE_BYTES`` or
    200 times its size when unpacked, or has members outside of its own folder.
    """
    try:
        if not path.is_file():
            raise error(f"{path} does not exist")
        with path.open("rb") as stream:
            return check_zip_stream(stream, path.name, what, error)
    except OSError as reason:
        raise error(f"{path.name} cannot be read: {reason.strerror}") from None


def check_zip_stream(
    stream: BinaryIO, name: str, what: str, error: type[NearfarError]
) -> list[zipfile.ZipInfo]:
    """The same for an open file, such as an archive inside of another one."""
    size = stream.seek(0, 2)
    try:
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as reason:
        raise error(f"{name} is not {what} ({reason}): save or copy it again") from None
    if not _one_directory(stream, size, len(members)):
        raise error(f"{name} is not {what} (bytes before or behind its contents): save it again")
    if len(members) > _MAX_MEMBERS:
        raise error(f"{name} has {len(members)} members: it is not {what}")
    total = sum(member.file_size for member in members)
    bound = min(limits.MAX_BUNDLE_FILE_BYTES, _MAX_RATIO * max(size, 2**20))
    if total > bound:
        raise error(f"{name} unpacks to {total} bytes: more than {what} may have")
    seen: set[str] = set()
    for member in members:
        parts = PurePosixPath(member.filename.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts:
            raise error(f"{name} has a member outside of it: {member.filename!r}")
        # What follows a NUL is cut off by one library and kept by another.
        if member.orig_filename != member.filename or not _NAME.fullmatch(member.filename):
            raise error(f"{name} has a member of no plain name: {member.orig_filename[:80]!r}")
        if member.filename.lower() in seen:  # torch compares names without case
            raise error(f"{name} has two members named {member.filename!r}")
        seen.add(member.filename.lower())
    return members


def _one_directory(stream: BinaryIO, size: int, count: int) -> bool:
    """Whether the table of contents ends where the records that point to it begin.

    Python finds it by its distance from the end of the file, torch by its offset from the
    start: they agree when nothing lies before, between or behind.
    """
    if size < _END.size:
        return False
    stream.seek(size - _END.size)
    mark, disk, start_disk, here, entries, length, offset, comment = _END.unpack(
        stream.read(_END.size)
    )
    if mark != b"PK\x05\x06" or (disk, start_disk, comment) != (0, 0, 0) or here != entries:
        return False
    end = size - _END.size
    if end >= _LOCATOR.size + _END_64.size:
        stream.seek(end - _LOCATOR.size)
        locator, first, position, disks = _LOCATOR.unpack(stream.read(_LOCATOR.size))
        if locator == b"PK\x06\x07":
            end -= _LOCATOR.size + _END_64.size
            stream.seek(end)
            record = _END_64.unpack(stream.read(_END_64.size))
            if record[0] != b"PK\x06\x06" or record[1] != _END_64.size - 12:
                return False
            if position != end or (first, disks) != (0, 1) or record[4:6] != (0, 0):
                return False
            wide = record[7], record[8], record[9]
            narrow = (entries, 0xFFFF), (length, 0xFFFFFFFF), (offset, 0xFFFFFFFF)
            if any(
                own not in (value, unknown)
                for value, (own, unknown) in zip(wide, narrow, strict=True)
            ):
                return False
            entries, length, offset = wide
    return bool(entries == count and offset + length == end)
