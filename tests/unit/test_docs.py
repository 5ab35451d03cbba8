from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Any

import pytest

from service.api.docs import DOCS_HEADERS, docs_page, tag
from tests.unit import openapi_sample

HOSTILE = """</script></style><img src=x onerror=alert(1)>'"`&amp;$(touch hacked)\\"""
VOID = {"input", "link", "meta", "wbr"}


class Page(HTMLParser):
    """A parsed page: its elements, and the text of elements with an id."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.contents = ""
        self.codes: dict[str, list[str]] = {}
        self._open: list[tuple[str, str | None]] = []
        self.source = docs_page(document)
        self.feed(self.source.decode())
        self.close()
        assert not self._open

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.elements if name in attributes]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append((tag, attributes.get("id")))
        if tag == "pre":
            self.codes.setdefault(self._article(), []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, place in self._open:
            if place:
                self.texts[place] = self.texts.get(place, "") + data
        if any(tag == "pre" for tag, _ in self._open):
            self.codes[self._article()][-1] += data
        if any(tag == "nav" for tag, _ in self._open):
            self.contents += data
        if self._open and self._open[-1][0] in {"style", "script"}:
            self.texts[self._open[-1][0]] = data

    def _article(self) -> str:
        return [place for tag, place in self._open if tag == "article" and place][-1]


@pytest.fixture
def document() -> openapi_sample.Node:
    return openapi_sample.document()


def curl_arguments(command: str) -> list[str]:
    """Run a curl example in a shell; return its arguments. Variables hold their names in lower case."""
    variables = {name: name.lower() for name in ("GATEWAY", "TOKEN", "TASK_ID", "NAME", "FORCE")}
    script = f"""curl() {{ printf '%s\\0' "$@"; }}\n{command}"""
    run = subprocess.run(
        ["/bin/sh", "-euc", script], env={**os.environ, **variables}, capture_output=True, check=True, text=True
    )
    return run.stdout.split("\0")[:-1]


def test_operations_are_listed_and_described(document: openapi_sample.Node) -> None:
    page = Page(document)
    operations = [(method, path) for path, item in document["paths"].items() for method in item]
    articles = [page.texts[place] for place in page.codes]
    assert len(operations) == len(articles) == 13
    for method, path in operations:
        assert any(text.startswith(f"{method.upper()} {path}") for text in articles)
        assert f"{method.upper()} {path}" in page.contents


def test_links_resolve(document: openapi_sample.Node) -> None:
    page = Page(document)
    places = page.attributes("id")
    inner = {link.removeprefix("#") for link in page.attributes("href") if link.startswith("#")}
    assert len(places) == len(set(places))
    assert inner <= set(places)
    assert {link for link in page.attributes("href") if not link.startswith("#")} == {"openapi.json", "data:,"}
    assert not page.attributes("src")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("post-v1-tasks-seamless", "fit number, 0.1 to 0.9, such as 0.3, default 0.5"),
        ("post-v1-tasks-upscale", "scale number, 1 to 8, default 2Growth factor."),
        ("post-v1-tasks-upscale", "steps integer, 20 to 40, default 30"),
        ("post-v1-tasks-upscale", "prompt string, at most 2,000 characters, default empty"),
        ("post-v1-tasks-upscale", "high_fidelity true or false, default false"),
        ("post-v1-tasks-upscale", "image requiredfilePNG, JPEG or WebP."),
        ("post-v1-tasks-upscale", "metadata string, application/jsonA JSON object"),
        ("post-v1-tasks-upscale", "webhook_url string, urimodel"),
        ("get-v1-tasks", "state one of queued, running, succeeded, failed"),
        ("get-v1-tasks-task-id", "Prefer stringwait=N: wait"),
        ("schema-task", "finished_at optionalnull or string, date-time"),
        ("schema-task", "metadata optionalobject of string"),
        ("schema-task", "state one of queued"),
        ("schema-task", "artifacts optionallist of Artifact"),
        ("schema-tasklist", "next_cursor optionalstring or null"),
        ("put-admin-v1-tenants-name", "accounts list of string"),
        ("put-admin-v1-tenants-name", "tasks integer, at least 0"),
    ],
)
def test_fields_show_their_constraints(document: openapi_sample.Node, place: str, words: str) -> None:
    assert words in Page(document).texts[place]


def test_response_headers_are_described(document: openapi_sample.Node) -> None:
    text = Page(document).texts["post-v1-tasks-upscale"]
    assert "Location Where the task is." in text
    assert "402 balance-exhausted with Retry-After413 " in text


def test_responses_are_sorted_by_status(document: openapi_sample.Node) -> None:
    assert "304 It has not changed.401 unauthenticated404 " in Page(document).texts["get-v1-tasks-task-id"]


def test_problems_are_listed_once(document: openapi_sample.Node) -> None:
    page = Page(document)
    assert page.texts["problem-too-many-active-tasks"] == "429too-many-active-tasksWait for a task to end."
    assert page.texts["problems"].count("unauthenticated") == 1
    assert "429 quota-exceeded, too-many-active-tasks504 " in page.texts["post-v1-tasks-upscale"]
    assert "#problem-quota-exceeded" in page.attributes("href")


def test_nested_schemas_are_described(document: openapi_sample.Node) -> None:
    page = Page(document)
    schema_ids = {place for place in page.texts if place.startswith("schema-")}
    assert schema_ids == {"schema-tasklist", "schema-task", "schema-artifact"}


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (
            "post-v1-tasks-seamless",
            [
                *("gateway/v1/tasks/seamless", "-H", "Authorization: Bearer token"),
                *("-H", "Idempotency-Key: order-4711", "-F", "image=@image.png", "-F", "fit=0.3"),
            ],
        ),
        (
            "post-v1-tasks-upscale",
            [
                *("gateway/v1/tasks/upscale", "-H", "Authorization: Bearer token"),
                *("-H", "Idempotency-Key: order-4711", "-F", "image=@image.png", "-F", "colors=8"),
            ],
        ),
        ("get-v1-tasks-task-id", ["gateway/v1/tasks/task_id", "-H", "Authorization: Bearer token"]),
        ("get-v1-tasks", ["gateway/v1/tasks?limit=50", "-H", "Authorization: Bearer token"]),
        (
            "get-v1-tasks-task-id-artifacts-name",
            ["-O", "gateway/v1/tasks/task_id/artifacts/name", "-H", "Authorization: Bearer token"],
        ),
        ("get-v1-tasks-task-id-events", ["-N", "gateway/v1/tasks/task_id/events", "-H", "Authorization: Bearer token"]),
        (
            "post-api-check-task-status",
            [
                "gateway/api/check_task_status",
                *("--data-urlencode", "user_key=token", "--data-urlencode", "task_id=task_id"),
            ],
        ),
        (
            "put-admin-v1-tenants-name",
            [
                *("-X", "PUT", "gateway/admin/v1/tenants/name", "-H", "Authorization: Bearer token"),
                *("-H", "Content-Type: application/json", "-d", '{"accounts": ["main"], "note": "it\'s"}'),
            ],
        ),
        (
            "delete-admin-v1-tenants-name",
            [
                *("-X", "DELETE", "gateway/admin/v1/tenants/name?force=force"),
                *("-H", "Authorization: Bearer token"),
            ],
        ),
        ("get-healthz", ["gateway/healthz"]),
    ],
)
def test_curl_examples_run_in_a_shell(document: openapi_sample.Node, place: str, expected: list[str]) -> None:
    assert curl_arguments(Page(document).codes[place][0]) == expected


def test_curl_examples_are_shell_safe(document: openapi_sample.Node) -> None:
    submit = document["paths"]["/v1/tasks/seamless"]["post"]
    submit["parameters"][1]["schema"]["examples"] = [HOSTILE]
    form = submit["requestBody"]["content"]["multipart/form-data"]["schema"]
    form["properties"] = {HOSTILE: {"type": "string", "examples": [HOSTILE]}}
    put = document["paths"]["/admin/v1/tenants/{name}"]["put"]
    put["requestBody"]["content"]["application/json"]["examples"]["plain"]["value"] = HOSTILE
    document["paths"] = {f"/{HOSTILE}": {"post": submit}, "/put": {"put": put}}
    submission, replacement = (curl_arguments(codes[0]) for codes in Page(document).codes.values())
    assert submission[0] == f"gateway/{HOSTILE}"
    assert f"Idempotency-Key: {HOSTILE}" in submission
    assert submission[-2:] == ["-F", f"{HOSTILE}={HOSTILE}"]
    assert json.loads(replacement[-1]) == HOSTILE


def test_responses_have_json_examples(document: openapi_sample.Node) -> None:
    task: dict[str, Any] = {
        "id": "task_8fK2",
        "kind": "upscale",
        "state": "queued",
        "created_at": "2026-01-31T12:00:00Z",
        "finished_at": None,
        "metadata": {},
        "artifacts": [{"name": "image", "href": "…"}],
        "parent": None,
    }
    codes = Page(document).codes
    assert json.loads(codes["get-v1-tasks-task-id"][1]) == task
    assert json.loads(codes["get-v1-quota"][1])["policies"] == [{"window": "day", "limit": 100, "used": 3}]


def test_text_is_escaped(document: openapi_sample.Node) -> None:
    plain, poisoned = Page(document), Page(_poisoned(document))
    kinds = {(tag, frozenset(attributes)) for tag, attributes in plain.elements}
    assert {(tag, frozenset(attributes)) for tag, attributes in poisoned.elements} == kinds
    assert [tag for tag, _ in poisoned.elements if tag in {"style", "script"}] == ["style", "script"]
    assert poisoned.texts["content"].count("<img src=x") > 100


def test_attributes_are_escaped() -> None:
    assert tag("a", href='"><script>') == '<a href="&quot;&gt;&lt;script&gt;"></a>'


def test_csp_allows_only_own_style_and_script(document: openapi_sample.Node) -> None:
    page = Page(document)
    metas = [attributes for tag, attributes in page.elements if tag == "meta" and "http-equiv" in attributes]
    policy = dict(part.strip().split(" ", 1) for part in str(metas[0]["content"]).split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["style-src"] == _hash(page.texts["style"])
    assert policy["script-src"] == _hash(page.texts["script"])
    assert DOCS_HEADERS["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith(("on", "style"))]


def test_page_is_below_50_kb(document: openapi_sample.Node) -> None:
    assert len(docs_page(document)) < 50_000


def test_empty_document() -> None:
    page = Page({"openapi": "3.1.0", "info": {"title": "Bare", "version": "0"}, "paths": {}})
    assert "problems" not in page.texts
    assert "Objects" not in page.texts["content"]


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _poisoned(node: Any, key: str = "") -> Any:
    """Append hostile text to every descriptive text of the document."""
    if isinstance(node, dict):
        return {
            (name + HOSTILE if key in {"properties", "paths"} else name): _poisoned(value, name)
            for name, value in node.items()
        }
    if isinstance(node, list):
        return [_poisoned(value, key) for value in node]
    words = {"title", "version", "description", "summary", "name", "default", "examples", "enum", "tags", "required"}
    if isinstance(node, str) and key in words:
        return node + HOSTILE
    return copy.copy(node)
