"""What a server costs: processor time and memory of its whole process tree (Linux)."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cpu_s", "has_mapped", "pss_bytes", "started_ticks", "tree"]

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def tree(root: int) -> list[int]:
    """``root`` and everything it started that still runs."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) is not None:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def started_ticks(pid: int) -> int | None:
    """When a process began, so that its number can be told from a later one's; None: it ended."""
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def cpu_s(root: int) -> float:
    """User and system time of the tree so far, ended children included."""
    total = 0
    for pid in tree(root):
        fields = _stat(pid)
        if fields is not None:
            total += int(fields[11]) + int(fields[12])
            if pid == root:
                total += int(fields[13]) + int(fields[14])
    return total / _TICKS_PER_S


def pss_bytes(pid: int) -> int:
    """Memory of one process, shared pages counted in proportion."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no Pss in smaps_rollup of {pid}")


def has_mapped(pid: int, word: str) -> bool:
    """Whether a file whose path holds ``word`` is mapped into a process."""
    return word in Path(f"/proc/{pid}/maps").read_text()


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat after the name (proc(5)): state, parent, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
