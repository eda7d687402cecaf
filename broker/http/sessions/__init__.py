"""``GET /v1/session``: many requests over one WebSocket. ``docs/session.md``."""
