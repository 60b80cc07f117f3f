"""Our own OpenAPI description, tried by schemathesis: no 5xx, and every answer is as described."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from .harness import serving

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = {
    ("get", "/health"),
    ("get", "/metrics"),
    ("get", "/version"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{name}"),
    ("post", "/v1/completions"),
    ("post", "/v1/chat/completions"),
    ("post", "/v1/responses"),
    ("get", "/v1/responses/{name}"),
    ("delete", "/v1/responses/{name}"),
    ("get", "/v1/sessions"),
    ("post", "/v1/sessions"),
    ("get", "/v1/sessions/{name}"),
    ("delete", "/v1/sessions/{name}"),
    ("post", "/v1/sessions/{name}/fork"),
    ("post", "/v1/sessions/{name}/restore"),
    ("post", "/tokenize"),
    ("post", "/detokenize"),
}


@pytest.fixture(scope="module")
def described(model_dir):
    with serving(model_dir, max_num_seqs=4, max_model_len=64) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_route_is_described(described):
    operations = [result.ok() for result in described.get_all_operations()]
    assert {(operation.method, operation.path) for operation in operations} == OPERATIONS


@pytest.mark.parametrize(("method", "path"), sorted(OPERATIONS))
def test_answers_are_as_described(described, method, path):
    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=described[path][method].as_strategy())
    def ask(case):
        assert case.call_and_validate(checks=CHECKS).status_code < 500

    ask()
