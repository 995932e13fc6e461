"""The route table as an OpenAPI 3.1 document, and nothing that is not in it."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from . import types as t
from .routes import ROUTES, Access, Route

_PARAMETER = re.compile(r"\{(\w+)\}")
_REF = "#/components/schemas/{name}"

_SECURITY: dict[Access, list[dict[str, list[str]]]] = {
    Access.OPEN: [],
    Access.SESSION: [{"session": []}],
    Access.OPERATOR: [{"operator": []}],
    Access.INVITE: [],
}


def document(version: str) -> dict[str, Any]:
    bodies = [route.body for route in ROUTES if route.body is not None]
    answers = [route.answer for route in ROUTES if route.answer is not None]
    types = list(dict.fromkeys([*bodies, *answers, t.Problem, t.WatchMessage]))
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    references = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, references)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Trimaran tracker", "version": version, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "session": {"type": "http", "scheme": "bearer"},
                "operator": {"type": "mutualTLS"},
            },
        },
    }


def _operation(route: Route, references: dict[type, dict[str, Any]]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "security": _SECURITY[route.access],
        "parameters": _parameters(route),
        "responses": {
            "200": _success(route, references),
            "default": {
                "description": "A problem document (RFC 9457)",
                "content": {"application/problem+json": {"schema": references[t.Problem]}},
            },
        },
    }
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": references[route.body]}},
        }
    return operation


def _success(route: Route, references: dict[type, dict[str, Any]]) -> dict[str, Any]:
    if route.answer is not None:
        return {
            "description": route.summary,
            "content": {"application/json": {"schema": references[route.answer]}},
        }
    if route.name == "watch":
        return {
            "description": "Server-sent events; the data of each is a WatchMessage",
            "content": {"text/event-stream": {"schema": references[t.WatchMessage]}},
        }
    media = "application/json" if route.name == "openapi" else "text/plain"
    return {"description": route.summary, "content": {media: {}}}


def query_parameters(route: Route) -> list[tuple[str, dict[str, Any], str]]:
    """Name, schema and meaning of what may stand in the query."""
    if route.name == "watch":
        return [
            ("prefix", {"type": "string", "default": "/"}, "A resource path without /v1; may be repeated"),
            ("since", {"type": "integer", "minimum": 0}, "Start after this revision; default: now"),
        ]
    parameters: list[tuple[str, dict[str, Any], str]] = []
    if route.method == "GET" and route.access is Access.SESSION:
        parameters += [
            (
                "consistency",
                {"type": "string", "enum": ["linearizable", "stale"], "default": "linearizable"},
                "What is inside a group is always read linearizably",
            ),
            ("min_revision", {"type": "integer", "minimum": 0}, "Answer once this node has seen it"),
        ]
    if route.name == "show_swarm":
        parameters.append(("manifest_id", {"type": "string"}, "Of a version; default: the current version's"))
    return parameters


def _parameters(route: Route) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(route.path)
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": schema, "description": about}
        for name, schema, about in query_parameters(route)
    ]
    if route.writes:
        parameters.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": True,
                "schema": {"type": "string", "format": "uuid"},
                "description": "A UUIDv7, new for each request and the same for its repetitions",
            }
        )
    return parameters
