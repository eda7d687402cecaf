"""Executors: where a batch of images runs."""
