"""``zoo:NAME``: the pair that needs no download."""

from __future__ import annotations

from converters.jobs import SourceRequest
from converters.sources.types import Built
from converters.weights import load_into
from edge_runtime.contract.errors import SourceError

__all__ = ["build_zoo"]


def build_zoo(name: str, request: SourceRequest) -> Built:
    """A zoo net, trained first when its weights are missing. Raises ``SourceError``."""
    from converters.worker import report_progress
    from converters.zoo import ZOO

    entry = ZOO.get(name)
    if entry is None:
        raise SourceError(f"the zoo has no model {name!r}; it has {', '.join(sorted(ZOO))}")
    module = entry.build()
    built = Built(module=module, preprocess=entry.preprocess, labels=entry.labels)
    if request.weights in (None, "DEFAULT"):
        path = entry.weights_path(
            lambda message, done, total: report_progress(message, done, total)
        )
        built.weights = f"zoo:{name}"
        built.weights_sha256 = load_into(module, path)
        built.temperature = entry.temperature()
    return built
