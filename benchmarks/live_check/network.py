"""Broker and device in network namespaces of their own, joined by the relay alone.

    device namespace ── veth ── here: the relay ── veth ── broker namespace

No route leads from one to the other, and nothing is forwarded: every byte crosses the relay.
Addresses are of 198.18.0.0/15, which RFC 2544 sets aside for benchmarks. Where namespaces
cannot be made (no root, no ``ip``), everything is on loopback, and ``reason`` says why.
"""

from __future__ import annotations

import os
import subprocess
from types import TracebackType
from typing import Self

__all__ = ["Network"]


class Network:
    """A context manager; on leaving, what it made is removed, and nothing else."""

    def __init__(self, *, loopback: bool = False, nice: int = 0) -> None:
        self.kind = "loopback"
        self.reason: str | None = "asked for" if loopback else None
        self._wanted = not loopback
        self.broker_host = self.relay_host = "127.0.0.1"
        self.prefix: tuple[str, ...] = ()
        """Of every process here; below: of those of one side."""
        if nice:
            self.prefix = ("nice", "-n", str(nice))
        self.broker_prefix: tuple[str, ...] = self.prefix
        self.device_prefix: tuple[str, ...] = self.prefix
        self._made: list[str] = []

    def __enter__(self) -> Self:
        if not self._wanted:
            return self
        number = os.getpid()
        base = number % 0x3FFF * 8
        subnets = [f"198.{18 + base // 65536}.{base // 256 % 256}.{base % 256 + i}" for i in (0, 4)]
        try:
            self.broker_prefix, _, self.broker_host = self._join("b", number, subnets[0])
            self.device_prefix, self.relay_host, _ = self._join("d", number, subnets[1])
        except (OSError, subprocess.CalledProcessError) as error:
            self._remove()
            said = getattr(error, "stderr", None) or str(error)
            self.reason = f"no network namespaces: {said.strip()[:200]}"
            self.broker_host = self.relay_host = "127.0.0.1"
            self.broker_prefix = self.device_prefix = self.prefix
            return self
        except BaseException:
            self._remove()
            raise
        self.kind = "network namespaces"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _join(self, letter: str, number: int, subnet: str) -> tuple[tuple[str, ...], str, str]:
        """A namespace with one link to here: command prefix, our address, its address."""
        name, ours, theirs = f"nearfar-{number}-{letter}", f"nf{letter}{number}", f"nf{letter}p"
        network, _, last = subnet.rpartition(".")
        our_address, their_address = (f"{network}.{int(last) + i}" for i in (1, 2))
        _ip("netns", "add", name)
        self._made.append(name)
        _ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        _ip("addr", "add", f"{our_address}/30", "dev", ours)
        _ip("link", "set", ours, "up")
        _ip("-n", name, "addr", "add", f"{their_address}/30", "dev", theirs)
        _ip("-n", name, "link", "set", theirs, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        return ("ip", "netns", "exec", name, *self.prefix), our_address, their_address

    def _remove(self) -> None:
        # A veth pair ends with the namespace that holds one end of it.
        while self._made:
            subprocess.run(["ip", "netns", "del", self._made.pop()], check=False)  # noqa: S607


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)  # noqa: S607
