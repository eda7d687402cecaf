"""What a socket has taken and not yet sent: bytes that only wait on this device.

The kernel takes megabytes at once. ``TCP_NOTSENT_LOWAT`` makes it stop early, and
``SIOCOUTQNSD`` says how much it holds that no packet carries yet. Where a system has
neither, the window of ``window.py`` alone bounds what waits.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from asyncio.trsock import TransportSocket
from typing import Final

try:
    from fcntl import ioctl
except ImportError:  # not a POSIX system
    ioctl = None  # type: ignore[assignment]

__all__ = ["LOW_WATER_BYTES", "limit_backlog", "unsent_bytes"]

LOW_WATER_BYTES: Final = 16 * 1024
_SIOCOUTQNSD: Final = 0x894B
"""Linux, ``linux/sockios.h``."""


def limit_backlog(opened: TransportSocket | socket.socket) -> None:
    """Ask the kernel to hold few unsent bytes, where it can be asked."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if option is not None:
        with contextlib.suppress(OSError):
            opened.setsockopt(socket.IPPROTO_TCP, option, LOW_WATER_BYTES)


def unsent_bytes(opened: TransportSocket | socket.socket | None) -> int:
    """Bytes in the kernel that were not sent yet; 0 where that cannot be known."""
    if opened is None or ioctl is None or not hasattr(socket, "AF_NETLINK"):  # Linux has it
        return 0
    try:
        answer = ioctl(opened.fileno(), _SIOCOUTQNSD, struct.pack("i", 0))
    except (OSError, ValueError):
        return 0  # closed meanwhile
    return int(struct.unpack("i", answer)[0])
