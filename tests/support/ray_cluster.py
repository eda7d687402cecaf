"""A real Ray cluster of several nodes on this machine."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import Any

__all__ = ["add_node", "local_cluster"]

_LOOPBACK = "127.0.0.2"
"""Ray takes 127.0.0.1 for the address that other machines see."""
_STORE_BYTES = 80 * 2**20


@contextlib.contextmanager
def local_cluster() -> Iterator[Any]:
    """A head alone, so that it is never the node that is lost; see ``add_node``."""
    saved = dict(os.environ)
    # Before the import, which reads it. All nodes inherit one token, no file holds it.
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "object_store_memory": _STORE_BYTES,
            "include_dashboard": False,
            "node_ip_address": _LOOPBACK,
        },
    )
    try:
        yield made
    finally:
        import ray

        ray.shutdown()
        made.shutdown()
        os.environ.clear()
        os.environ.update(saved)


def add_node(cluster: Any) -> Any:
    """One more node, with one slot."""
    return cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES, node_ip_address=_LOOPBACK)
