"""The floor: aiohttp alone, which reads the body and answers. No key, no quota, no model."""

from __future__ import annotations

import sys

from aiohttp import web


async def predict(request: web.Request) -> web.Response:
    return web.json_response({"answer": len(await request.read())})


def main() -> None:
    app = web.Application()
    app.router.add_post("/predict", predict)
    web.run_app(
        app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None, backlog=2048
    )


if __name__ == "__main__":
    main()
