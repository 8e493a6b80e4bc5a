"""Schemathesis reads the service's own description and sends what fits it and what does not: nothing may fail
inside."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from uvicorn_process import run_server

CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
METHODS = {"/predict": "POST", "/predict/columns": "POST", "/labels": "POST", "/routing": "PUT"}
PATHS = ["/predict", "/predict/columns", "/labels", "/", "/openapi.json", "/metrics", "/livez", "/readyz", "/routing"]
SENT = [(path, GenerationMode.POSITIVE) for path in PATHS] + [(path, GenerationMode.NEGATIVE) for path in METHODS]
seeded = {"derandomize": True, "database": None, "phases": [Phase.generate]}
many = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), **seeded)


@pytest.fixture(scope="module")
def service(toy, tmp_path_factory):
    "The URL of a running service, and what it says of itself"
    with run_server(toy, tmp_path_factory.mktemp("predictions"), MLNB_SNAPSHOT_MAX_AGE_MINUTES="1000000000") as (
        _,
        url,
    ):
        yield url, schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize(("path", "mode"), SENT)
def test_nothing_that_is_sent_makes_the_service_fail(service, path, mode):
    operation = service[1][path][METHODS.get(path, "GET")]

    @many
    @given(case=operation.as_strategy(generation_mode=mode))
    def sent(case):
        response = case.call()
        if response.status_code == 503:  # the replay of a time that nothing is known of, as described
            assert "no feature snapshot is available" in response.json()["error"]
        else:
            case.validate_response(response, checks=CHECKS)

    sent()


def test_every_path_is_described_with_its_errors_and_a_real_example(service):
    url, described = service[0], service[1].raw_schema
    assert list(described["paths"]) == PATHS and set(described["components"]["securitySchemes"]) == {"bearer", "header"}
    for path, of in described["paths"].items():
        for method, told in of.items():
            assert path in ("/livez", "/readyz") or {"401", "403"} <= set(told["responses"])
            for kind, media in told.get("requestBody", {"content": {}})["content"].items():
                if kind == "application/json":
                    status = httpx.request(method, url + path, json=media["example"]).status_code
                    assert status == (409 if path == "/routing" else 200)  # this service follows no registry
