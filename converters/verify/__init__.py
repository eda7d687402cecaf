"""Proof: every saved file of a bundle against its reference, on real images."""
