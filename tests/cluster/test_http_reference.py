"""What the API says of itself: OpenAPI, the reference pages, metrics."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from trackers import running

from cluster import problems
from cluster.api import problems as kinds
from cluster.api import types as t
from cluster.api.openapi import document
from cluster.api.routes import ROUTES
from cluster.consensus import Refusal, Rejected
from state_machine.outcomes import Code, Refused

FOLDER = Path(__file__).parents[2] / "docs" / "reference"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_http", FOLDER / "generate_http.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_says() -> None:
    pages = generator().pages(FOLDER)
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, f"run docs/reference/generate_http.py: {path.name}"
    there = set((FOLDER / "problems").glob("*.md"))
    assert there == {path for path in pages if path.parent.name == "problems"}


def test_openapi_names_every_route_and_every_reference_resolves() -> None:
    described = document("1.2.3")
    operations = {
        (method.upper(), path): operation
        for path, item in described["paths"].items()
        for method, operation in item.items()
    }
    assert operations.keys() == {(route.method, route.path) for route in ROUTES}
    assert {operation["operationId"] for operation in operations.values()} == {r.name for r in ROUTES}
    schemas = described["components"]["schemas"]

    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if "$ref" in value else []
            return own + [ref for inner in value.values() for ref in references(inner)]
        return [ref for inner in value for ref in references(inner)] if isinstance(value, list) else []

    found = references(described)
    assert found
    assert all(ref.removeprefix("#/components/schemas/") in schemas for ref in found)
    for route in ROUTES:
        names = {p["name"] for p in operations[route.method, route.path]["parameters"] if p["in"] == "path"}
        assert names == {part[1:-1] for part in route.path.split("/") if part.startswith("{")}


@pytest.mark.parametrize("code", list(Code))
def test_every_refusal_of_the_machine_is_a_problem(code: Code) -> None:
    problem = problems.of_refused(Refused(code, "words", "field", "hint", 7))
    expected = "indefinite" if code is Code.REQUEST_TOO_OLD else "definite"
    document = problem.document({"node": "n1", "leader": None, "term": 1, "revision": 2})
    assert (document["outcome"], document["field"], document["hint"]) == (expected, "field", "hint")
    assert 400 <= document["status"] < 502
    assert set(document) == set(t.Problem.__struct_fields__)


@pytest.mark.parametrize("refusal", list(Refusal))
def test_every_refused_proposal_is_definite_and_has_words(refusal: Refusal) -> None:
    problem = problems.of_rejected(Rejected(refusal))
    assert problem.kind.outcome == "definite"
    assert problem.detail.endswith("nothing was done.")


def test_codes_are_unique_and_statuses_are_errors() -> None:
    assert len(kinds.KINDS) == len({kind.type for kind in kinds.KINDS.values()}) >= 20
    assert all(400 <= kind.status < 600 for kind in kinds.KINDS.values())


async def test_metrics_are_what_prometheus_reads(tmp_path: Path) -> None:
    async with running(tmp_path) as trackers:
        anna = await trackers.user("anna")
        await trackers.group("boats", anna)
        await trackers.call("GET", "/v1/groups", session=None)
        text = (await trackers.call("GET", "/metrics")).body.decode()
        samples = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert samples["trimaran_http_requests_total", "200", "create_group"] == 1
        assert samples["trimaran_http_requests_total", "401", "list_groups"] == 1
        assert samples["trimaran_http_request_seconds_count", "register"] == 1
        assert samples["trimaran_http_request_seconds_bucket", "+Inf", "register"] == 1
        assert samples["trimaran_proposals_total", "applied"] == 3  # a key, a user, a group
        assert samples["trimaran_raft_role", "leader"] == 1
        assert samples["trimaran_state", "groups"] == 1
        assert samples["trimaran_revision",] == trackers[0].machine.revision
        assert (await trackers.call("GET", "/healthz")).body == b"ok\n"
        assert (await trackers.call("GET", "/readyz")).body == b"ready\n"
        assert (await trackers.call("GET", "/openapi.json")).json["openapi"] == "3.1.0"
