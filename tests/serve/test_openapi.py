"""The OpenAPI document against the server that it describes, by schemathesis."""

import httpx
import pytest

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, settings  # noqa: E402
from schemathesis.checks import CHECKS  # noqa: E402

from tests.serve.conftest import running  # noqa: E402
from tests.serve.scripted_engine import ScriptedEngine  # noqa: E402

WAIVED = {
    "positive_data_acceptance": "a schema can't say that token ids lie in the vocabulary, that a prompt fits the context "
    "or that one field needs another",
}
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")


@pytest.fixture(scope="module")
def small():
    with running(ScriptedEngine(context=48, slots=2)) as server:
        yield server


@pytest.fixture
def document(small):
    return schemathesis.openapi.from_url(f"{small.url}/openapi.json")


api = schemathesis.pytest.from_fixture("document")


@api.parametrize()
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_answer_is_one_that_the_document_names(case):
    waived = [CHECKS.get_one(name) for name in WAIVED]
    case.call_and_validate(excluded_checks=waived, timeout=30)


def test_the_document_tells_no_lies_about_errors(small):
    paths = httpx.get(f"{small.url}/openapi.json").json()["paths"]
    for path, operations in paths.items():
        for operation in operations.values():
            documented = operation["responses"]
            assert "422" not in documented, "malformed requests get status 400"
            wanted = "AnthropicErrorBody" if path.startswith("/v1/messages") else "ErrorBody"
            errors = [answer for status, answer in documented.items() if status[0] in "45"]
            assert errors
            assert all(e["content"]["application/json"]["schema"]["$ref"].endswith(f"/{wanted}") for e in errors)
    for path in STREAMED:
        assert set(paths[path]["post"]["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert set(paths["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
    assert set(paths["/v1/responses/{response}"]["get"]["responses"]) == {"404", "4XX"}
