"""Servables: the folders the broker loads, opened and verified."""
