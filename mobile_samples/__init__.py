"""Samples for app developers."""
