"""Emulated links, trace replay."""
