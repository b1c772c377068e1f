"""The OpenAPI document against the server that it describes, by schemathesis."""

import httpx
import pytest

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import CHECKS  # noqa: E402

from llmlite.serve.app import create_app  # noqa: E402
from llmlite.serve.models import ModelSpec  # noqa: E402
from llmlite.serve.settings import ServeSettings  # noqa: E402
from tests.serve.conftest import running  # noqa: E402
from tests.serve.scripted_engine import ScriptedEngine  # noqa: E402

WAIVED = {
    "positive_data_acceptance": "a schema can't say that token ids lie in the vocabulary, that a prompt fits the context "
    "or that one field needs another",
}
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
DOCUMENT = create_app([ModelSpec("model", lambda: None)], ServeSettings()).openapi()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = [(path, method) for path, operations in DOCUMENT["paths"].items() for method in operations]


@pytest.fixture(scope="module")
def small():
    with running(ScriptedEngine(context=48, slots=2)) as server:
        yield server


VALID = [(path, method, GenerationMode.POSITIVE) for path, method in OPERATIONS]
INVALID = [(path, method, GenerationMode.NEGATIVE) for path, method in OPERATIONS if method == "post"]


@pytest.mark.parametrize(("path", "method", "mode"), VALID + INVALID)
def test_every_answer_is_one_that_the_document_names(path, method, mode, small):
    operation = SCHEMA[path][method]
    waived = [CHECKS.get_one(name) for name in WAIVED]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def check(case):
        case.call_and_validate(base_url=small.url, excluded_checks=waived, timeout=30)

    check()


def test_what_is_sent_to_every_endpoint_is_served(small):
    """Schemathesis rarely finds the model's name, so each endpoint's success is looked at on its own."""
    chat = {"messages": [{"role": "user", "content": "say:a"}]}
    bodies = {
        "/v1/chat/completions": [chat, {**chat, "logprobs": True, "top_logprobs": 1}],
        "/v1/completions": [{"prompt": "say:a"}, {"prompt": "say:a", "echo": True, "logprobs": 1}],
        "/v1/embeddings": [{"input": "a"}, {"input": "a", "encoding_format": "base64"}],
        "/v1/responses": [{"input": "say:a"}, {"input": "say:abcd", "max_output_tokens": 2}],
        "/v1/messages": [{**chat, "max_tokens": 5}, {**chat, "max_tokens": 5, "stop_sequences": ["a"]}],
        "/v1/messages/count_tokens": [chat],
        "/tokenize": [{"content": "a"}, {"content": "é", "with_pieces": True}, chat],
        "/detokenize": [{"tokens": [97]}],
    }
    assert {path for path, method in OPERATIONS if method == "post"} == set(bodies)
    for path, examples in bodies.items():
        for body in examples:
            case = SCHEMA[path]["post"].Case(body={"model": "model", **body}, media_type="application/json")
            response = case.call(base_url=small.url)
            assert response.status_code == 200, response.text
            case.validate_response(response)
    for path in ["/health", "/ready", "/metrics", "/v1/models"]:
        SCHEMA[path]["get"].Case().call_and_validate(base_url=small.url)


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
