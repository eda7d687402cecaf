"""One program for each peer, run by the peer's own environment."""
