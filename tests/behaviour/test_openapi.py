"""The OpenAPI documents: their examples, and requests that schemathesis generates (`tests/clients` has their clients).

Their files are up to date (`make drift`), so what they say is tested without a gateway.
"""

from __future__ import annotations

import asyncio
import json
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import yaml
from hypothesis import settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from schemathesis.engine import events, from_schema

from service.domain.tasks import Kind
from service.domain.webhooks import event_id
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway, run_real_gateway
from tests.support.images import make_png
from tests.support.valkey import Valkey

FOLDER = Path(__file__).parents[2] / "openapi"
HOOK_URL = "https://hooks.example/tasks"
IMAGE_URL = "The address of the image"
"""The description of `image_url` begins with it."""
DATA_URL = f"data:image/png;base64,{b64encode(make_png()).decode()}"


def iter_objects(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    if isinstance(node, dict | list):
        for item in node.values() if isinstance(node, dict) else node:
            yield from iter_objects(item)


@pytest.mark.parametrize("name", ["gateway", "operators"])
def test_examples_match_their_schemas(name: str) -> None:
    document = yaml.load((FOLDER / f"{name}.yaml").read_bytes(), yaml.CSafeLoader)
    for node in iter_objects(document):
        if isinstance(node.get("properties"), dict):
            node.setdefault("additionalProperties", False)
    examples: list[tuple[Any, dict[str, Any]]] = []
    for node in iter_objects(document):
        if "schema" in node and "examples" in node:
            examples += [(example["value"], node["schema"]) for example in node["examples"].values()]
        elif "type" in node and isinstance(node.get("examples"), list):
            examples += [(example, node) for example in node["examples"]]
    assert len(examples) > 15
    for example, schema in examples:
        root = schema | {"components": document["components"]}  # to which its references point
        Draft202012Validator(root, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(example)


@pytest.mark.parametrize("kind", Kind)
def test_exactly_one_of_image_and_url(kind: Kind) -> None:
    document = yaml.load((FOLDER / "gateway.yaml").read_bytes(), yaml.CSafeLoader)
    (media,) = document["paths"][f"/v1/tasks/{kind}"]["post"]["requestBody"]["content"].values()
    form, both = Draft202012Validator(media["schema"]), {"image": "", "image_url": HOOK_URL}
    assert all(form.is_valid({name: value}) for name, value in both.items())
    assert not form.is_valid({})
    assert not form.is_valid(both)


ACCEPTANCE, REJECTION = "positive_data_acceptance", "negative_data_rejection"
REGISTRY = r"(PUT|PATCH) /admin/v1/(registry|(accounts|tenants)/\{name\})"


EXCLUSIONS = (
    (REJECTION, "POST /api/.*", "200"),  # the upstream's protocol has errors in the body of a 200
    (REJECTION, "POST .*/tokens", "201"),  # null is no body, which is optional
    ("response_schema_conformance", "GET .*/events", "200"),  # the schema of the stream is applied to an event
    (ACCEPTANCE, "POST /v1/.*", "422 image(_url)?"),  # exactly one of both
    (ACCEPTANCE, "POST /v1/.*", "422 idempotency-key-reused"),  # the key was used before
    (ACCEPTANCE, "POST /v1/.*", "422 (model|style)"),  # the catalogue is configuration
    (ACCEPTANCE, "POST /v1/.*", "422 metadata"),  # `contentSchema` is ignored
    (ACCEPTANCE, "GET .*/tasks", "400 malformed-request"),  # a cursor comes from the previous page
    (ACCEPTANCE, "GET .*/usage", "422 (from|to)"),  # the first day must not be after the last
    (ACCEPTANCE, "GET .*/usage", "422 tenant"),  # there must be, or have been, such a tenant
    (ACCEPTANCE, "POST .*/tokens", "422 expires_at"),  # must be in the future
    (ACCEPTANCE, "POST .*/refunds", "422 submission"),  # either `task` or `submission`
    (ACCEPTANCE, REGISTRY, r"422 accounts(\[\d+\])?"),  # the accounts must exist
    (ACCEPTANCE, REGISTRY, "422 user_key"),  # required for a new account and for another host
    (ACCEPTANCE, REGISTRY, r"422 webhook\.url"),  # required for a new webhook
    (ACCEPTANCE, REGISTRY, r"422 limits(\[\d+\])?"),  # each has tasks or money; one for each window
    (ACCEPTANCE, REGISTRY, r"422 (.*\.money|floor_money|max_price\..*)"),  # at most two decimals
    (ACCEPTANCE, REGISTRY, r"422 (.*\.tasks|max_active|floor_count|id)"),  # integers have no fraction, as in 1.0
    (ACCEPTANCE, REGISTRY, r"422 webhook\.secret"),  # the base64 of 24 to 64 bytes
    (ACCEPTANCE, REGISTRY, r"422 (webhook\.allow|allow_image_url)\[\d+\]"),  # a host or a network
    (ACCEPTANCE, REGISTRY, r"422 tokens\..*_at"),  # a year from 1970 on
)
"""What a check reports by mistake: check, operation, and status with the refused field or the code of the problem."""


@pytest.mark.slow
@pytest.mark.parametrize("port", ["tenants", "operators"])
async def test_generated_requests(valkey: Valkey, monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    async with run_real_gateway(valkey, GATEWAY_POLL_SECONDS="0.1") as gateway:
        poller = asyncio.create_task(gateway.services.task_poller.run())  # else streams and waits would not end
        url, token = (gateway.url, gateway.token) if port == "tenants" else (gateway.ops_url, ADMIN_TOKEN)
        document = (await gateway.http.get(f"{url}/openapi.json")).json()
        operations: dict[str, Any] = {}
        for path, item in document["paths"].items():
            operations |= {f"{method.upper()} {path}": operation for method, operation in item.items()}
        for operation in operations.values():
            del operation["responses"]["default"]  # with it, every status would be documented
        for node in iter_objects(operations):
            if node.get("description", "").startswith(IMAGE_URL):
                node["format"] = "data-url"  # needs no server
            for word in ("if", "then", "else"):  # of which schemathesis can't judge files
                node.pop(word, None)
        await add_examples(gateway, operations)
        succeeded, findings = await asyncio.to_thread(run_checks, document, url, token)
        poller.cancel()
        await asyncio.wait([poller])
    assert not findings, "\n\n".join(findings)
    assert succeeded == operations.keys()


async def add_examples(gateway: RunningGateway, operations: Mapping[str, Any]) -> None:
    """Add ids that no generated request would have. The account of the tenant is rich from now on."""
    await gateway.upstream.set_balance(100_000, 100_000)
    for tenant in ("shop", "spare"):
        await gateway.put_tenant(tenant, webhook={"url": HOOK_URL})
    token = await gateway.call_admin("POST", "/tenants/spare/tokens", json={})
    task = (await gateway.submit(headers={"Prefer": "wait"})).json()
    assert task["state"] == "succeeded"
    submission = gateway.services.submissions.resolve_submission_id(task["id"])
    examples = {
        "GET /v1/submissions/{submission_id}": {"submission_id": submission},
        "GET /admin/v1/submissions/{submission_id}": {"submission_id": submission},
        "GET /admin/v1/tasks/{task_id}": {"task_id": task["id"]},
        "DELETE /admin/v1/tenants/{name}/tokens/{token_id}": {"name": "spare", "token_id": token.json()["id"]},
        "POST /admin/v1/tenants/{name}/webhook-secret": {"name": "spare"},
        "POST /admin/v1/webhooks/{delivery_id}/redeliver": {"delivery_id": event_id(submission)},
    }
    for label in examples.keys() & operations.keys():
        for parameter in operations[label]["parameters"]:
            if parameter["name"] in examples[label]:
                parameter["example"] = examples[label][parameter["name"]]
    if refund := operations.get("POST /admin/v1/refunds"):
        (media,) = refund["requestBody"]["content"].values()
        media["example"] = {"submission": submission, "reason": "It was of no use."}
    for kind in Kind:  # few generated ones have exactly one of `image` and `image_url`
        if submit := operations.get(f"POST /v1/tasks/{kind}"):
            (media,) = submit["requestBody"]["content"].values()
            media["example"] = {"image_url": DATA_URL}


def run_checks(document: dict[str, Any], url: str, token: str) -> tuple[set[str], list[str]]:
    """Run all phases; return the operations that succeeded, and what the checks found."""
    succeeded: set[str] = set()
    findings: list[str] = []
    for event in from_schema(load_schema(document, url, token)).execute():
        assert not isinstance(event, events.FatalError | events.NonFatalError), event
        if isinstance(event, events.ScenarioFinished):
            findings += iter_findings(event.recorder)
            for case_id, interaction in event.recorder.interactions.items():
                operation = event.recorder.cases[case_id].value.operation
                is_own_method = interaction.request.method == operation.method.upper()
                if is_own_method and interaction.response and interaction.response.status_code < 300:
                    succeeded.add(operation.label)
    return succeeded, findings


def load_schema(document: dict[str, Any], url: str, token: str) -> schemathesis.BaseSchema:
    today = datetime.now(UTC).date()
    schemathesis.openapi.format("binary", st.just(make_png()))
    schemathesis.openapi.format("uri", st.just(HOOK_URL))
    schemathesis.openapi.format("data-url", st.just(DATA_URL))
    schemathesis.openapi.format("date", st.dates(today - timedelta(days=30), today).map(str))
    config = {
        "seed": 1,
        "base-url": url,
        "headers": {"Authorization": f"Bearer {token}"},
        "workers": 1,
        "continue-on-failure": True,
        "request-timeout": 60,
        "max-stream-events": 3,
        "cache": {"enabled": False},
        "generation": {
            "max-examples": settings().max_examples // 20 + 1,
            "deterministic": True,
            "database": "none",
            "no-shrink": True,
        },
        "checks": {
            # 412: a precondition with the ETag of another state goes before the body.
            ACCEPTANCE: {"expected-statuses": ["2xx", "3xx", "401", "403", "404", "409", "412"]},
            REJECTION: {"expected-statuses": ["400", "401", "403", "404", "405", "409", "412", "413", "415", "422"]},
        },
    }
    return schemathesis.openapi.from_dict(document, config=schemathesis.Config.from_dict(config))


def iter_findings(recorder: Any) -> Iterator[str]:
    for case_id, checks in recorder.checks.items():
        for check in checks:
            if info := check.failure_info:
                response = recorder.interactions[case_id].response
                text = response.content.decode(errors="replace")
                for subject in find_subjects(response):
                    found = check.name, info.failure.operation, subject
                    if not any(all(map(re.fullmatch, excluded, found)) for excluded in EXCLUSIONS):
                        yield "\n".join((check.name, subject, info.failure.message, info.code_sample, text[:1_000]))


def find_subjects(response: Any) -> list[str]:
    """Return the status with each refused field, or with the code of the problem if no field is named."""
    status = response.status_code
    if response.headers.get("content-type") != ["application/problem+json"] or not response.content:
        return [str(status)]
    problem = json.loads(response.content)
    fields = [error["field"] for error in problem.get("errors", ())]
    entries = [re.sub(r'^(accounts|tenants)\.("[^"]*"|[^.]+)\.', "", field) for field in fields]
    return [f"{status} {name}" for name in entries or [problem["code"]]]
