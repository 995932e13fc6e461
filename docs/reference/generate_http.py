"""The reference of the HTTP API, written from the code: `docs/reference/http.md` and the pages of problems.

    python docs/reference/generate_http.py

writes them; a test compares them with what stands there. Owned here: their form. What they say is in
`cluster/api/` (`routes.py`, `types.py`, `problems.py`) and `state_machine/limits.py`.
"""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Meta, Struct

from cluster.api import types as t
from cluster.api.openapi import query_parameters
from cluster.api.problems import KINDS, Kind
from cluster.api.routes import ROUTES, Access, Route
from state_machine import events, limits

_ACCESS = {
    Access.OPEN: "anyone",
    Access.SESSION: "signed in",
    Access.OPERATOR: "operator",
    Access.INVITE: "invite",
}

_INTRODUCTION = """\
# The tracker's HTTP API

<!-- Written by `docs/reference/generate_http.py` from the code; do not edit. -->

Any node answers anything. Bodies and answers are JSON; `/openapi.json` of a running node describes the
same in OpenAPI 3.1. Names in paths are percent-encoded UTF-8.

**Every answer** carries `node` (who answered), `leader`, `term` and `revision`. On a write, `revision` is
that of the change; a repetition has that of the first answer.

**Sessions.** `Authorization: Bearer SESSION`, from `POST /v1/sessions`. Operators are known by a client
certificate of the cluster's CA, not by an account. The order of checks is session, membership, existence:
about what is inside a group, a stranger gets the same 403 whether it exists or not.

**Writes** marked with a key need `Idempotency-Key`, a new UUIDv7 for each request. The same key again, on
any node, after any failover, gives the first answer; with another request it is refused
([request-mismatch](problems/request-mismatch.md)). Outcomes are kept for the last {kept:,} writes or
{kept_mib} MiB of them, whichever is reached first; past that the answer is
[indefinite](problems/request-too-old.md), never a second execution.

**Reads** take `consistency=linearizable` (the default) or `stale`, and `min_revision`. What is inside a
group is always read linearizably, for membership decides about it.

**Problems** are RFC 9457 documents (`application/problem+json`). `outcome` says whether the thing may have
happened: `definite` (it did not) or `indefinite` (it may have); `hint` says what to do next. Each `type`
has a page: {pages}.

**Watch.** `GET /v1/watch?prefix=&since=` is a stream of server-sent events. Each message has a revision as
its id and all events of that revision that the reader may see. A comment `: hb`, with an id line that
says how far the stream is, comes every 250 ms while the node hears a quorum. `since` or `Last-Event-ID`
resumes on any node. Before the kept history the answer is 410: list again, then watch from that answer's
revision. A last event named `end` says why the node ends a stream (`reason`: slow, session-ended,
history-lost, stopping) and what to do (`hint`).
"""


def pages(folder: Path) -> dict[Path, str]:
    """Every page by its path."""
    found = {folder / "http.md": _http()}
    for kind in KINDS.values():
        found[folder / "problems" / f"{kind.code}.md"] = _problem(kind)
    return found


def write(folder: Path) -> None:
    wanted = pages(folder)
    for stale in set((folder / "problems").glob("*.md")) - wanted.keys():
        stale.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _http() -> str:
    links = ", ".join(f"[{code}](problems/{code}.md)" for code in sorted(KINDS))
    parts = [
        _INTRODUCTION.format(
            kept=limits.REQUESTS_KEPT_MAX, kept_mib=limits.REQUESTS_KEPT_BYTES_MAX >> 20, pages=links
        ),
        "## Routes\n",
        "| | path | who | key | |\n|---|---|---|---|---|",
        *(_row(route) for route in ROUTES),
        "",
        *(_route(route) for route in ROUTES),
        "## Types\n",
        *(_type(shape) for shape in _types()),
        "## Events\n",
        _events(),
        "## Limits\n",
        "| limit | value |\n|---|---|",
        *(f"| `{name}` | {value:,} |" for name, value in vars(limits).items() if name.isupper()),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _row(route: Route) -> str:
    key = "yes" if route.writes else ""
    return (
        f"| {route.method} | [`{route.path}`](#{route.name}) | {_ACCESS[route.access]} | {key} "
        f"| {route.summary} |"
    )


def _route(route: Route) -> str:
    lines = [f"### {route.name}\n", f"`{route.method} {route.path}` — {route.summary}.\n"]
    if parameters := query_parameters(route):
        for name, schema, about in parameters:
            lines.append(f"- `?{name}=` {schema['type']}: {about}")
        lines.append("")
    body = "no body" if route.body is None else _link(route.body)
    answer = "not JSON" if route.answer is None else _link(route.answer)
    lines.append(f"Body: {body}. Answer: {answer}.\n")
    return "\n".join(lines)


def _link(shape: type) -> str:
    return f"[{shape.__name__}](#{shape.__name__.lower()})"


def _types() -> list[type[Struct]]:
    """All that bodies and answers are made of, in the order of `types.py`."""
    bases = (t.Body, t.Answer)
    return [
        shape
        for shape in vars(t).values()
        if isinstance(shape, type)
        and issubclass(shape, Struct)
        and shape is not Struct
        and shape not in bases
    ]


def _type(shape: type[Struct]) -> str:
    lines = [f"### {shape.__name__}\n"]
    text = shape.__doc__
    if text and not text.startswith(f"{shape.__name__}("):
        lines.append(inspect.cleandoc(text) + "\n")
    envelope = set(t.Answer.__struct_fields__) if issubclass(shape, t.Answer) else set()
    rows = [field for field in msgspec.structs.fields(shape) if field.name not in envelope]
    if not rows:
        return lines[0] + "\nNothing but what every answer carries.\n"
    lines.append("| field | type | default |\n|---|---|---|")
    for field in rows:
        default = "" if field.default is msgspec.NODEFAULT else f"`{_literal(field.default)}`"
        lines.append(f"| `{field.encode_name}` | {_spell(field.type)} | {default} |")
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _spell(annotation: Any) -> str:
    """A type as people read it: text, number, bounds."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        base, *metas = typing.get_args(annotation)
        bounds = "; ".join(_bounds(meta) for meta in metas if isinstance(meta, Meta))
        return f"{_spell(base)} ({bounds})" if bounds else _spell(base)
    if origin is list:
        return f"list of {_spell(typing.get_args(annotation)[0])}"
    if origin is typing.Literal:
        return " or ".join(f"`{_literal(value)}`" for value in typing.get_args(annotation))
    arguments = typing.get_args(annotation)
    if arguments:
        return " or ".join(_spell(argument) for argument in arguments)
    if isinstance(annotation, type) and issubclass(annotation, Struct):
        return _link(annotation)
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    return names.get(annotation, "any")


def _bounds(meta: Meta) -> str:
    said = [
        ("at least", meta.ge),
        ("at most", meta.le),
        ("length at least", meta.min_length),
        ("length at most", meta.max_length),
    ]
    found = [f"{words} {value:,}" for words, value in said if value is not None]
    if meta.pattern is not None:
        found.append(f"`{meta.pattern}`")
    return ", ".join(found)


def _events() -> str:
    """The table that stands in the docstring of `state_machine/events.py`."""
    text = inspect.cleandoc(events.__doc__ or "")
    return "\n".join(line for line in text.splitlines() if line.startswith("|")) + "\n"


def _problem(kind: Kind) -> str:
    meaning = {
        "definite": "definite: it did not happen, and will not",
        "indefinite": "indefinite: it may have happened, or may still",
    }
    again = "yes, at this or another node" if kind.retry else "no: the answer would be the same"
    return (
        f"# {kind.title}\n\n"
        "<!-- Written by `docs/reference/generate_http.py` from the code; do not edit. -->\n\n"
        f"`{kind.type}` · status {kind.status}\n\n"
        f"{kind.about}\n\n"
        f"**What to do.** {kind.advice}\n\n"
        f"| | |\n|---|---|\n| outcome | {meaning[kind.outcome]} |\n"
        f"| the same request again, unchanged | {again} |\n"
    )


if __name__ == "__main__":
    write(Path(__file__).parent)
