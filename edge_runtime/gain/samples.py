"""What both sides said of each image, as arrays: the data that a fit is made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.gain.fit import Values

__all__ = ["Samples"]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """N images, in the order of their digests, so that no order of files changes a fit."""

    digests: tuple[str, ...]
    """Hex SHA-256 of each file."""
    agreement: Values
    """How much of the cloud's answer the local one shares, 0 to 1, ``[N]``."""
    confidence: Values | None = None
    """As the runtime reports it, ``[N]``; None: answers of this file carry no score."""
    truth: NDArray[np.int64] | None = None
    """The right class, ``[N]``; None: without labels."""
    local_right: Values | None = None
    """0 or 1, ``[N]``; None: without labels."""
    cloud_right: Values | None = None
    logits: NDArray[np.float32] | None = None
    """The local file's, ``[N, C]``, of a classifier with softmax or without activation
    (then the logarithm of its scores); None: no temperature can be fitted."""

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def fold(self) -> NDArray[np.int64]:
        """0 or 1 for each image, ``[N]``: the half it lies in.

        The last bit of its digest's first byte: no choice of ours, the same on every run.
        """
        return np.array([int(digest[1], 16) & 1 for digest in self.digests], dtype=np.int64)

    def where(self, chosen: NDArray[np.bool_]) -> Samples:
        """The chosen ones, ``[N]``."""

        def pick(values: Values | None) -> Values | None:
            return None if values is None else values[chosen]

        return Samples(
            digests=tuple(d for d, keep in zip(self.digests, chosen, strict=True) if keep),
            agreement=self.agreement[chosen],
            confidence=pick(self.confidence),
            truth=None if self.truth is None else self.truth[chosen],
            local_right=pick(self.local_right),
            cloud_right=pick(self.cloud_right),
            logits=None if self.logits is None else self.logits[chosen],
        )
