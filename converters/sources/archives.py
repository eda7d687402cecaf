"""Look into a zip archive from outside before any library reads it."""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath

from edge_runtime.contract import limits
from edge_runtime.contract.errors import SourceError

__all__ = ["check_zip"]

_MAX_MEMBERS = 100_000
_MAX_RATIO = 200


def check_zip(path: Path, what: str) -> list[zipfile.ZipInfo]:
    """The members of ``path``, found bounded in number, size and names.

    Raises ``SourceError`` for something that is no zip, grows beyond
    ``limits.MAX_BUNDLE_FILE_BYTES`` or ``_MAX_RATIO`` times its size when unpacked, or has
    members outside of its own folder.
    """
    if not path.is_file():
        raise SourceError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise SourceError(f"{path.name} is not {what}: {error}") from None
    if len(members) > _MAX_MEMBERS:
        raise SourceError(f"{path.name} has {len(members)} members: it is not {what}")
    total = sum(member.file_size for member in members)
    bound = min(limits.MAX_BUNDLE_FILE_BYTES, _MAX_RATIO * max(path.stat().st_size, 2**20))
    if total > bound:
        raise SourceError(f"{path.name} unpacks to {total} bytes: more than {what} may have")
    for member in members:
        name = PurePosixPath(member.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts:
            raise SourceError(f"{path.name} has a member outside of it: {member.filename!r}")
    return members
