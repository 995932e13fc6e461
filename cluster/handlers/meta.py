"""What machines ask about the node: life, readiness, metrics, the API's description."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import orjson
from aiohttp import web

from cluster.api.openapi import document
from cluster.call import Call

if TYPE_CHECKING:
    from cluster.service import Service


async def health(service: Service, call: Call) -> web.Response:
    del service, call
    return web.Response(text="ok\n")


async def ready(service: Service, call: Call) -> web.Response:
    del call
    reason = service.unready_reason()
    return web.Response(text=f"{reason or 'ready'}\n", status=503 if reason else 200)


async def metrics(service: Service, call: Call) -> web.Response:
    del call
    return web.Response(
        body=service.metrics.text(),
        headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
    )


async def openapi(service: Service, call: Call) -> web.Response:
    del call
    return web.Response(body=_document(service.settings.version), content_type="application/json")


@cache
def _document(version: str) -> bytes:
    return orjson.dumps(document(version))


HANDLERS = (health, ready, metrics, openapi)
