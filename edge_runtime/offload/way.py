"""What a request needs of the way to the cloud: one broker, or one chosen among several."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from edge_runtime.offload.transport import UploadReceipt
from edge_runtime.offload.uplink import CloudAnswer, Uplink
from edge_runtime.policies.base import CloudOutlook, LinkOutlook

__all__ = ["Way"]


class Way(Protocol):
    """May be used from any thread; see ``Uplink`` for what each does."""

    @property
    def model_sha256(self) -> str | None:
        """Digest of the cloud model, once it is known."""

    def outlook(
        self, link_type: str, own_bytes: int = 0, network_id: str | None = None
    ) -> tuple[LinkOutlook, CloudOutlook]:
        """What a policy may know now."""

    def submit(
        self,
        body: bytes,
        media_type: str,
        deadline_s: float,
        receipt: UploadReceipt | None = None,
    ) -> Future[CloudAnswer]:
        """Upload one image or seed."""

    def prewarm(self, *, forced: bool = False) -> Future[bool]:
        """Open a connection."""

    def pick(self, url: str | None) -> Uplink:
        """The broker of this URL; None, or one that is not there any more: one to use now."""
