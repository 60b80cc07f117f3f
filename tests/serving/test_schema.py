"""Our own OpenAPI description, tried by schemathesis: no 5xx, and every answer is as described."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from spikingbrain_serving import LLM, AsyncLLM
from spikingbrain_serving.http.app import create_app

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.fixture(scope="module")
def described(model_dir):
    engine = AsyncLLM(LLM(model_dir, max_num_seqs=4, max_model_len=64).engine)
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(engine, "tiny"))


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_answers_are_as_described(case):
    response = case.call_and_validate(checks=CHECKS)
    assert response.status_code < 500
