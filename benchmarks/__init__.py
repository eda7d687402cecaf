"""Benchmarks: each module with a ``main`` is one, and runs by itself.

    python -m benchmarks               # every one, JSON under build/bench
    python -m benchmarks.NAME --json F # one
    python -m benchmarks --quick       # the short form of each

Every benchmark takes ``--json FILE`` and ``--quick``, and writes ``machine`` beside its
figures: milliseconds of two machines cannot be compared, ratios measured in one process can.
"""
