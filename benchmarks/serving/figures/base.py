"""What every figure is given, and what it gives."""

from __future__ import annotations

import contextlib
import time
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
    until_s: float | None = None
    """On the monotonic clock: no round begins that would not end by then."""
    figures_left: int = 1
    """They share the time that is left."""
    started: int = 0

    def turns(self) -> Iterator[int]:
        """Numbers of the rounds: in each every server is measured, in turn with the others.

        Three, one in a quick run, and fewer than three where the time does not allow them.
        """
        began_s = time.monotonic()
        for number in range(1 if self.quick else 3):
            now_s = time.monotonic()
            if number and self.until_s is not None:
                share_s = (self.until_s - began_s) / max(self.figures_left, 1)
                if (now_s - began_s) * (number + 1) / number > share_s:
                    return
            yield number

    @contextlib.contextmanager
    def server(
        self, name: str, work: Work, tenants: tuple[Tenant, ...] = (Tenant(),)
    ) -> Iterator[Target]:
        """A server of this run, stopped at the end of the block."""
        self.started += 1
        with start(name, work, self.folder / f"{self.started}", tenants) as target:
            yield target

    def servers(self, *, tuned: bool) -> tuple[str, ...]:
        """The broker and the peers; with ``tuned`` in each configuration they have.

        In a quick run only the tuned one then, where there is one: under overload it is the better.
        """
        chosen = [peer for peer in self.peers if tuned or not peer.endswith(" tuned")]
        if tuned and self.quick:
            chosen = [peer for peer in chosen if f"{peer} tuned" not in chosen]
        return (NEARFAR, *chosen)
