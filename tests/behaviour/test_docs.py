"""The pages at `/docs` on both ports."""

from __future__ import annotations

import base64
import hashlib
from html.parser import HTMLParser
from urllib.parse import urljoin

from httpx2 import Response

from service.api.errors import PROBLEMS
from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import run_fake_gateway


class PageReader(HTMLParser):
    """The elements of a page with their attributes, and the text of its scripts."""

    def __init__(self, response: Response) -> None:
        super().__init__()
        assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline_scripts = ""
        self.feed(response.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.inline_scripts += data.strip()


def assert_nothing_external(response: Response) -> None:
    """Assert that the policy of a page allows no other host, no inline script and no `eval`."""
    policy = {
        name: sources for name, *sources in map(str.split, response.headers["content-security-policy"].split(";"))
    }
    assert policy["default-src"] == ["'none'"]
    assert policy["script-src"] == policy["connect-src"] == ["'self'"]
    sources = {source for sources in policy.values() for source in sources}
    assert sources <= {"'none'", "'self'", "'unsafe-inline'", "blob:", "data:"}
    assert response.headers["x-content-type-options"] == "nosniff"


async def test_viewer_shows_the_document_of_its_port() -> None:
    async with run_fake_gateway() as (gateway, _, _):
        for url, path in ((gateway.url, "/v1/tasks/upscale"), (gateway.ops_url, "/admin/v1/tenants/{name}")):
            response = await gateway.http.get(f"{url}/docs")
            assert_nothing_external(response)
            page = PageReader(response)
            setup, viewer = [attributes for name, attributes in page.elements if name == "script"]
            assert page.inline_scripts == ""
            loaded = [
                await gateway.http.get(urljoin(f"{url}/docs", address))
                for address in (setup["src"], viewer["src"], "openapi.json")
            ]
            assert all(item.url.netloc == response.url.netloc for item in loaded)
            setup_script, program, document = loaded
            assert 'url: "openapi.json"' in setup_script.text
            assert path in document.json()["paths"]
            assert {item.headers["content-type"] for item in loaded[:2]} == {"text/javascript; charset=utf-8"}
            assert program.headers["content-encoding"] == "gzip"
            assert "immutable" in program.headers["cache-control"]
            digest = base64.b64encode(hashlib.sha256(program.content).digest()).decode()
            assert viewer["integrity"] == f"sha256-{digest}"


async def test_root_leads_to_the_docs() -> None:
    async with run_fake_gateway() as (gateway, _, _):
        response = await gateway.http.get(f"{gateway.url}/")
    assert (response.status_code, response.headers["location"]) == (302, "/docs")


async def test_slashes_after_docs_lead_to_the_docs() -> None:
    """The addresses on the page are relative to its own."""
    async with run_fake_gateway() as (gateway, _, _):
        for page in (f"{gateway.url}/docs", f"{gateway.ops_url}/docs"):
            for slashes in ("/", "//"):
                response = await gateway.http.get(page + slashes)
                assert response.status_code == 302
                assert urljoin(page + slashes, response.headers["location"]) == page


async def test_problems_link_to_their_description() -> None:
    async with run_fake_gateway() as (gateway, _, _):
        for url in (gateway.url, gateway.ops_url):
            problem = await gateway.http.get(f"{url}/nowhere")
            expect_problem(problem, 404, "not-found")
            path, _, fragment = problem.links["help"]["url"].partition("#")
            response = await gateway.http.get(url + path)
            assert_nothing_external(response)
            ids = {attributes.get("id") for _, attributes in PageReader(response).elements}
            assert fragment in ids
            assert ids >= {problem.code for problem in PROBLEMS}
