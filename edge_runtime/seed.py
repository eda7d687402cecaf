"""What a bundle that generates is asked with: a seed instead of a photo."""

from __future__ import annotations

import msgspec

from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.wire import JSON_MEDIA_TYPE, MAX_SEED, encode_seed

__all__ = ["Seed"]


class Seed(msgspec.Struct, frozen=True):
    """One image to generate; one seed always means the same latent."""

    value: int

    @classmethod
    def read(cls, seed: int) -> Seed:
        """Check it. Raises ``ConfigError``."""
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise ConfigError(f"a seed is a whole number, 0 to {MAX_SEED}, not {seed!r}")
        return cls(seed)

    @property
    def upload_bytes(self) -> int:
        """Size of the body to upload."""
        return len(encode_seed(self.value))

    def upload(self) -> tuple[bytes, str]:
        """The body to upload and its media type."""
        return encode_seed(self.value), JSON_MEDIA_TYPE
