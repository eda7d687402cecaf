"""What every figure is given, and what it gives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.serving.targets import NEARFAR, Target, Tenant, start
from benchmarks.serving.workload import Work

__all__ = ["Bench", "Finding", "Row"]

Row = dict[str, Any]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One figure, measured."""

    title: str
    rows: list[Row]
    """One a server (and a round, where rounds differ), for the table and for the record."""
    passed: dict[str, bool]
    """By demand."""
    note: str = ""


class Bench(msgspec.Struct, kw_only=True):
    """The setting of a run."""

    folder: Path
    quick: bool
    peers: tuple[str, ...]
    """Those that are installed, with their configuration: ``litserve tuned``."""
    trivial: str
    resnet18: str
    photo: bytes
    tensor: bytes
    started: int = 0

    @property
    def rounds(self) -> int:
        """How often each server is measured, in turn with the others."""
        return 1 if self.quick else 3

    @contextlib.contextmanager
    def server(
        self, name: str, work: Work, tenants: tuple[Tenant, ...] = (Tenant(),)
    ) -> Iterator[Target]:
        """A server of this run, stopped at the end of the block."""
        self.started += 1
        with start(name, work, self.folder / f"{self.started}", tenants) as target:
            yield target

    def servers(self, *, tuned: bool) -> tuple[str, ...]:
        """The broker and the peers; with ``tuned`` in each configuration they have."""
        return (NEARFAR, *(peer for peer in self.peers if tuned or not peer.endswith(" tuned")))
