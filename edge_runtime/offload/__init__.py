"""The way to the broker: transport, breaker, discovery and what is learned on the way."""

from edge_runtime.offload.transport import HttpRequest, HttpResponse, Transport

__all__ = ["HttpRequest", "HttpResponse", "Transport"]
