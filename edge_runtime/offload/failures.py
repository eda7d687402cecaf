"""Every way aiohttp, the TLS layer and the system can fail, as an error of ours."""

from __future__ import annotations

import ssl

import aiohttp

from edge_runtime.contract.errors import (
    BrokerFault,
    DeadlineExceeded,
    NearfarError,
    NetworkUnreachable,
    RequestRejected,
    WireError,
)

__all__ = ["translate"]


def translate(error: Exception, url: str) -> NearfarError:
    """The ``RemoteError`` or ``WireError`` for what a client call raised.

    Order matters: aiohttp's classes inherit from several others.
    """
    if isinstance(error, NearfarError):
        return error
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return NetworkUnreachable(f"no connection to {url} in time: check the network")
    if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientConnectorError):
        return DeadlineExceeded(f"{url} did not answer in time")
    if isinstance(error, aiohttp.ClientSSLError | aiohttp.ServerFingerprintMismatch | ssl.SSLError):
        return NetworkUnreachable(
            f"the TLS certificate or handshake of {url} was refused ({_reason(error)}): "
            "check the URL, or pass the broker's own CA as tls="
        )
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return NetworkUnreachable(f"the host of {url} has no address: check the URL and the DNS")
    if isinstance(error, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
        return RequestRejected(f"{url} cannot be used as a broker URL: use http:// or https://")
    if isinstance(error, aiohttp.ClientConnectorError):
        return NetworkUnreachable(
            f"no connection to {url} ({_reason(error.os_error)}): check that the broker runs there"
        )
    if isinstance(error, aiohttp.TooManyRedirects | aiohttp.RedirectClientError):
        return BrokerFault(f"{url} redirects: pass the broker's final URL")
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.WSMessageTypeError):
        return WireError(f"{url} did not answer in HTTP ({_reason(error)}): is a broker there?")
    if isinstance(error, aiohttp.ClientError | OSError):
        return NetworkUnreachable(
            f"the connection to {url} broke ({_reason(error)}): try again later"
        )
    if isinstance(error, ValueError | LookupError | EOFError):
        return WireError(f"the answer of {url} makes no sense ({_reason(error)})")
    # RuntimeError("Session is closed") and what a later aiohttp may think of.
    return BrokerFault(f"the exchange with {url} failed ({_reason(error)})")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
