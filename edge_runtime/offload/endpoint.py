"""Check a broker's URL and key before anything is sent."""

from __future__ import annotations

import re
from ipaddress import ip_address
from urllib.parse import urlsplit

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError

__all__ = ["check_api_key", "check_broker_url"]

_KEY = re.compile(r"[\x21-\x7e]{1,512}\Z")


def check_broker_url(url: str, *, with_key: bool) -> None:
    """Raise ``ConfigError`` unless ``url`` is http(s), plain and safe for a key.

    ``with_key``: an API key travels with each request, so ``http://`` is taken for this
    machine only.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
        parts = urlsplit("")
    if (
        parts.scheme not in ("http", "https")
        or not host
        or port == 0
        or len(url) > limits.MAX_HEADER_CHARS
        or not url.isascii()
        or re.search(r"[\x00-\x20]", url)
    ):
        raise ConfigError(f"broker must be a URL such as https://broker.example, not {url[:200]!r}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "the broker URL must have no user, password, query or fragment: pass a key as api_key"
        )
    if with_key and parts.scheme == "http" and not _is_loopback(host):
        raise ConfigError(
            f"the API key would travel to {host} unencrypted: use https://, or pass "
            "allow_plain_http=True on a network that you trust"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def check_api_key(api_key: str) -> None:
    """Raise ``ConfigError`` unless the key can be a header value."""
    if not _KEY.match(api_key):
        raise ConfigError("an API key has 1 to 512 printable ASCII characters and no spaces")
