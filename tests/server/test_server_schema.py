"""The API conforms to its OpenAPI description; schemathesis sends valid and invalid requests."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import icar_jax
from icar_jax.search.server.settings import ServerSettings
from tests.support import serverkit

pytestmark = pytest.mark.check
OPERATIONS = {
    ("GET", "/api/search"), ("POST", "/api/search"), ("POST", "/api/search/image"), ("GET", "/api/images/{id}"),
    ("GET", "/api/images/{id}/thumbnail"), ("GET", "/api/store"), ("GET", "/healthz"), ("GET", "/readyz"),
}  # fmt: skip
PLAIN = ("/api/store", "/healthz", "/readyz")  # take no parameters


@pytest.fixture(scope="module")
def address(clip_folder, complexity_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("schema")
    model = icar_jax.load(serverkit.make_bundle(clip_folder, complexity_folder, folder / "bundle"), batch_size=8)
    serverkit.fill(folder / "store", model, serverkit.draw(folder / "pictures", 8))
    with serverkit.running(serverkit.backend(folder / "store", model), ServerSettings(port=0)) as address:
        yield address


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_is_as_described(address, mode):
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    tried = set()
    for found in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations():
        operation = found.ok()
        if mode.is_negative and operation.path in PLAIN:
            continue  # no invalid request is possible

        @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def conforms(case):
            case.call_and_validate(checks=checks, timeout=60)

        conforms()
        tried.add((operation.method.upper(), operation.path))
    assert tried == {each for each in OPERATIONS if not (mode.is_negative and each[1] in PLAIN)}


def test_the_description_is_complete(address):
    paths = httpx.get(f"{address}/openapi.json", timeout=60).json()["paths"]
    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == OPERATIONS
    for path, methods in paths.items():
        for method, operation in methods.items():
            assert operation.get("description") or operation.get("summary"), (method, path)
