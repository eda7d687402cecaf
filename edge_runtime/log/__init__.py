"""The decision log: what was decided for each request, from what, and what came of it."""

from edge_runtime.log.entries import LogEntry, Outcome, PolicyRecord, Step
from edge_runtime.log.reader import LogFile, read_log
from edge_runtime.log.writer import DecisionLog

__all__ = ["DecisionLog", "LogEntry", "LogFile", "Outcome", "PolicyRecord", "Step", "read_log"]
