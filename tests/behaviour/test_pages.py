"""The pages for people: guides, problems, and the links between them."""

from __future__ import annotations

import re
from urllib.parse import urldefrag, urljoin

import pytest

from service.api.errors import PROBLEMS
from service.api.guides import GUIDE_NAMES, OPERATOR_GUIDE_NAMES
from tests.behaviour.gateway_fixture import MAX_BYTES, MAX_PIXELS, RunningGateway, run_real_gateway
from tests.behaviour.requests import assert_nothing_external, expect_problem
from tests.support.valkey import Valkey


@pytest.mark.smoke
async def test_links_of_all_pages(gateway: RunningGateway) -> None:
    """From `/docs` every guide is found, and every link of every page leads to an existing page and heading."""
    pages = await crawl(gateway, gateway.url)
    assert {f"{gateway.url}/docs/{name}" for name in (*GUIDE_NAMES, "problems")} < pages.keys()
    operators_pages = await crawl(gateway, gateway.ops_url)
    names = ("docs", "docs/problems", *(f"docs/{name}" for name in OPERATOR_GUIDE_NAMES))
    assert operators_pages.keys() == {f"{gateway.ops_url}/{name}" for name in names}
    for url, text in (pages | operators_pages).items():
        for link in re.findall(r'href="([^"]*#[^"]+)"', text):
            page, fragment = urldefrag(urljoin(url, link))
            assert f'id="{fragment}"' in (pages | operators_pages)[page], link
        for source in re.findall(r'(?:src|<link [^>]*href)="([^"]+)"', text):
            loaded = await gateway.http.get(urljoin(url, source))
            assert loaded.status_code == 200, source
            assert "access-control-allow-origin" not in loaded.headers


async def crawl(gateway: RunningGateway, root: str) -> dict[str, str]:
    """Return the text of every page that `/docs` leads to, by its address."""
    pages: dict[str, str] = {}
    pending = {f"{root}/docs"}
    while pending:
        response = await gateway.http.get(pending.pop())
        assert_nothing_external(response)
        pages[str(response.url)] = response.text
        links = {urljoin(str(response.url), link) for link in re.findall(r'<a [^>]*href="([^"]+)"', response.text)}
        own = {link for link in links if link.startswith(root)}
        assert all(link.startswith("https://") for link in links - own)
        pending |= {urldefrag(link).url for link in own} - {*pages, f"{root}/openapi.json"}
    return pages


async def test_playground(gateway: RunningGateway, valkey: Valkey) -> None:
    """It loads and calls its own origin only, and is there only if it is switched on."""
    page = await gateway.http.get(f"{gateway.url}/playground")
    assert_nothing_external(page)
    policy = page.headers["content-security-policy"]
    assert "style-src 'self'; img-src 'self' blob:; " in policy
    assert "frame-ancestors 'none'" in policy
    assert not re.search(r"<style|style=|<script>| on[a-z]+=", page.text)
    (module,) = re.findall(r'src="(playground/\S+\.js)"', page.text)
    pending, modules = {f"{gateway.url}/{module}"}, set()
    while pending:
        script = await gateway.http.get(pending.pop())
        assert (script.status_code, script.headers["content-type"]) == (200, "text/javascript; charset=utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|Storage|cookie =", script.text)
        modules.add(str(script.url))
        pending |= {urljoin(str(script.url), name) for name in re.findall(r'from "(\./\S+)"', script.text)} - modules
    assert len(modules) > 5
    redirect = await gateway.http.get(f"{gateway.url}/playground/")
    assert urljoin(f"{gateway.url}/playground/", redirect.headers["location"]) == f"{gateway.url}/playground"
    expect_problem(await gateway.http.get(f"{gateway.ops_url}/playground"), 404, "not-found")
    async with run_real_gateway(valkey, GATEWAY_PLAYGROUND="off") as other:
        expect_problem(await other.http.get(f"{other.url}/playground"), 404, "not-found")
        assert "playground" not in (await other.http.get(f"{other.url}/docs")).text


async def test_guides_state_the_settings(gateway: RunningGateway) -> None:
    page = (await gateway.http.get(f"{gateway.url}/docs/limits")).text
    assert f"{MAX_BYTES:,} bytes" in page
    assert f"{MAX_PIXELS:,}" in page
    assert "{{" not in page


async def test_advice_on_every_problem(gateway: RunningGateway) -> None:
    for url in (gateway.url, gateway.ops_url):
        page = (await gateway.http.get(f"{url}/docs/problems")).text
        entries = re.findall(r'<section class="problem" id="([^"]+)">.*?</p>\n<p>.*?</p>\n<p>', page, re.DOTALL)
        assert entries == [problem.code for problem in PROBLEMS]
