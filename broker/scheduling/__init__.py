"""Scheduling: who is admitted, who waits, and which requests run together."""
