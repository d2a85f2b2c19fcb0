"""The API keeps to its own description: schemathesis sends what it allows, and what it does not."""

import httpx
import pytest
import schemathesis
import serverkit
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import icar_jax
from icar_jax.search.server.settings import ServerSettings

pytestmark = pytest.mark.check
OPERATIONS = {
    ("GET", "/api/search"), ("POST", "/api/search"), ("POST", "/api/search/image"), ("GET", "/api/images/{id}"),
    ("GET", "/api/images/{id}/thumbnail"), ("GET", "/api/store"), ("GET", "/healthz"), ("GET", "/readyz"),
}  # fmt: skip


@pytest.fixture(scope="module")
def address(clip_folder, complexity_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("schema")
    model = icar_jax.load(serverkit.make_bundle(clip_folder, complexity_folder, folder / "bundle"), batch_size=8)
    serverkit.fill(folder / "store", model, serverkit.draw(folder / "pictures", 8))
    with serverkit.running(serverkit.backend(folder / "store", model), ServerSettings(port=0)) as address:
        yield address


@pytest.fixture
def described(address):
    return schemathesis.openapi.from_url(f"{address}/openapi.json")


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_described(case):
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    case.call_and_validate(checks=checks, timeout=60)


def test_the_description_is_complete(address):
    paths = httpx.get(f"{address}/openapi.json", timeout=60).json()["paths"]
    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == OPERATIONS
    for path, methods in paths.items():
        for method, operation in methods.items():
            assert operation.get("description") or operation.get("summary"), (method, path)
