"""A REQUEST frame held to the same rules as the headers of a POST."""

from __future__ import annotations

from broker.http.accept import answer_types, negotiate
from broker.http.answering import Ask
from broker.http.choosing import choose_version
from broker.http.context import Services, Trace
from broker.http.headers import (
    Query,
    announced_bytes,
    body_kind,
    check_top_k,
    known_media_type,
    require_known,
)
from edge_runtime.contract.frames import Request
from edge_runtime.contract.wire import check_deadline_ms

__all__ = ["read_ask"]


def read_ask(services: Services, trace: Trace, frame: Request, address: str | None = None) -> Ask:
    """The request that ``frame`` announces; notes its model in ``trace``.

    ``address``: of the device. Raises what ``POST`` raises for the same words.
    """
    servable = choose_version(
        services, trace, frame.model, frame.version, address=address, key=frame.key
    )
    kind = body_kind(servable.task)
    media_type = known_media_type(frame.media_type, kind)
    bound_bytes = announced_bytes(frame.size_bytes, kind)
    parameters = {"top_k": frame.top_k, "palette": frame.palette}
    require_known({name for name, value in parameters.items() if value is not None}, servable.task)
    query = Query(
        top_k=None if frame.top_k is None else check_top_k(frame.top_k),
        palette=bool(frame.palette),
    )
    wanted = negotiate(frame.accept, answer_types(servable.task))
    deadline_ms = check_deadline_ms(frame.deadline_ms)
    return Ask(
        servable=servable,
        version=frame.version,
        kind=kind,
        media_type=media_type,
        size_bytes=frame.size_bytes,
        bound_bytes=bound_bytes,
        query=query,
        wanted=wanted,
        deadline_s=trace.arrived_s + deadline_ms / 1e3,
        key=frame.key,
    )
