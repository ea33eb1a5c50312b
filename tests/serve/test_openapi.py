"""The OpenAPI document of the server, and requests that schemathesis makes from it.

tests/fuzz/server_requests.py knows what a chat is and goes deeper; here nothing is known but the document, and what is
compared with it are the answers: their status, kind and form. QAP_EXAMPLES=2000 makes so many of each, and others each
time.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from serve.conftest import FUZZED, Served, serving

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
from schemathesis import checks  # noqa: E402
from schemathesis.specs.openapi import checks as conformance  # noqa: E402

EXAMPLES = os.environ.get("QAP_EXAMPLES")
#: Not asked whether wrong data are refused: "5" for 5 is taken, as llama-cpp-python's server takes it, and unknown
#: fields are passed over.
CHECKS = [
    checks.not_a_server_error, conformance.status_code_conformance, conformance.content_type_conformance,
    conformance.response_schema_conformance, conformance.response_headers_conformance,
]  # fmt: skip


def test_what_the_document_says(server: Served) -> None:
    status, document = server.get("/openapi.json")
    assert status == 200
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert {"200", "4XX", "5XX"} == set(operation["responses"]), path
            assert operation["description"], path
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert "PruneConfig" in fields["prune"]["description"]


OPERATIONS = (
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/extras/tokenize"),
    ("POST", "/extras/tokenize/count"), ("POST", "/extras/detokenize"), ("GET", "/v1/models"), ("GET", "/health"),
    ("GET", "/metrics"),
)  # fmt: skip


@pytest.fixture(scope="module")
def schema() -> Iterator[Any]:
    with serving(*FUZZED) as server:
        yield schemathesis.openapi.from_url(server.url + "/openapi.json")


def test_all_operations_are_tried(schema: Any) -> None:
    found = {(op.ok().method.upper(), op.ok().path) for op in schema.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*row, mode) for mode in ("positive", "negative") for row in OPERATIONS if "POST" in row or mode == "positive"],
)
def test_requests_made_from_the_document(schema: Any, method: str, path: str, mode: str) -> None:
    """Statuses, kinds and forms of answers are the documented ones, none is a 5xx, and the server lives."""
    operation = schema[path][method]
    found: collections.Counter[int] = collections.Counter()

    @settings(
        max_examples=int(EXAMPLES or 40), deadline=None, derandomize=EXAMPLES is None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def send(case: Any) -> None:
        response = case.call(timeout=60)
        case.validate_response(response, checks=CHECKS)
        found[response.status_code] += 1

    send()
    print(f"{method} {path} {mode}: {dict(found)}")
    assert found
    assert set(found) <= {200, 400}, found
    if method == "GET" or (path.startswith("/extras/tok") and mode == "positive"):
        assert set(found) == {200}, found
