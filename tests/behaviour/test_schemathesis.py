"""Requests that schemathesis generates from both OpenAPI documents, and its checks of the responses."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest
import schemathesis
from hypothesis import settings
from hypothesis import strategies as st
from schemathesis.engine import events, from_schema

from service.domain.webhooks import event_id
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway, run_real_gateway
from tests.behaviour.openapi_reader import iter_operations
from tests.support.images import make_png
from tests.support.valkey import Valkey

HOOK_URL = "https://hooks.example/tasks"
ACCEPTANCE, REJECTION = "positive_data_acceptance", "negative_data_rejection"
REGISTRY = r"(PUT|PATCH) /admin/v1/(registry|(accounts|tenants)/\{name\})"


class Exclusion(NamedTuple):
    """What a check reports by mistake: regular expressions of the operation and of the subject.

    The subject is the status with the refused field, or with the code of the problem.
    """

    check: str
    operation: str
    subject: str
    reason: str


EXCLUSIONS = (
    Exclusion(REJECTION, "POST /api/.*", "200", "the upstream's protocol has errors in the body of a 200"),
    Exclusion(REJECTION, "POST .*/tokens", "201", "null is no body, which is optional"),
    Exclusion("response_schema_conformance", "GET .*/events", "200", "the schema of the stream is applied to an event"),
    Exclusion(ACCEPTANCE, "POST /v1/.*", "422 idempotency-key-reused", "the key was used before"),
    Exclusion(ACCEPTANCE, "POST /v1/.*", "422 (model|style)", "the catalogue is configuration"),
    Exclusion(ACCEPTANCE, "POST /v1/.*", "422 metadata", "`contentSchema` is ignored"),
    Exclusion(ACCEPTANCE, "GET .*/tasks", "400 malformed-request", "a cursor comes from the previous page"),
    Exclusion(ACCEPTANCE, "GET .*/usage", "422 (from|to)", "the first day must not be after the last"),
    Exclusion(ACCEPTANCE, "GET .*/usage", "422 tenant", "there must be, or have been, such a tenant"),
    Exclusion(ACCEPTANCE, "POST .*/tokens", "422 expires_at", "must be in the future"),
    Exclusion(ACCEPTANCE, "POST .*/refunds", "422 submission", "either `task` or `submission`"),
    Exclusion(ACCEPTANCE, REGISTRY, r"422 accounts(\[\d+\])?", "the accounts must exist"),
    Exclusion(ACCEPTANCE, REGISTRY, "422 user_key", "required for a new account and for another host"),
    Exclusion(ACCEPTANCE, REGISTRY, r"422 webhook\.url", "required for a new webhook"),
    Exclusion(ACCEPTANCE, REGISTRY, r"422 limits(\[\d+\])?", "each has tasks or money; one for each window"),
    Exclusion(ACCEPTANCE, REGISTRY, r"422 (.*\.money|floor_money|max_price\..*)", "at most two decimals"),
    Exclusion(
        ACCEPTANCE, REGISTRY, r"422 (.*\.tasks|max_active|floor_count|id)", "integers have no fraction, as in 1.0"
    ),
    Exclusion(ACCEPTANCE, REGISTRY, r"422 webhook\.secret", "the base64 of 24 to 64 bytes"),
    Exclusion(ACCEPTANCE, REGISTRY, r"422 webhook\.allow\[\d+\]", "a host or a network"),
    Exclusion(ACCEPTANCE, REGISTRY, r"422 tokens\..*_at", "a year from 1970 on"),
)


class Finding(NamedTuple):
    check: str
    operation: str
    subject: str
    message: str
    request: str
    response: str

    @property
    def is_excluded(self) -> bool:
        return any(
            self.check == exclusion.check
            and re.fullmatch(exclusion.operation, self.operation)
            and re.fullmatch(exclusion.subject, self.subject)
            for exclusion in EXCLUSIONS
        )


@pytest.mark.slow
@pytest.mark.parametrize("port", ["tenants", "operators"])
async def test_generated_requests(valkey: Valkey, monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    async with run_real_gateway(valkey, GATEWAY_POLL_SECONDS="0.1") as gateway, poll_tasks(gateway):
        url, token = (gateway.url, gateway.token) if port == "tenants" else (gateway.ops_url, ADMIN_TOKEN)
        document = (await gateway.http.get(f"{url}/openapi.json")).json()
        operations = {f"{method.upper()} {path}": operation for path, method, operation in iter_operations(document)}
        for operation in operations.values():
            del operation["responses"]["default"]  # with it, every status would be documented
        await add_examples(gateway, operations)
        succeeded, findings = await asyncio.to_thread(run_checks, document, url, token)
    assert not findings, "\n\n".join("\n".join(item[:1_000] for item in finding) for finding in findings)
    assert succeeded == operations.keys()


@asynccontextmanager
async def poll_tasks(gateway: RunningGateway) -> AsyncIterator[None]:
    """Let tasks end, and with them the streams and waits for them."""
    poller = asyncio.create_task(gateway.services.task_poller.run())
    try:
        yield
    finally:
        poller.cancel()
        with suppress(asyncio.CancelledError):
            await poller


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


def run_checks(document: dict[str, Any], url: str, token: str) -> tuple[set[str], list[Finding]]:
    """Run all phases; return the operations that succeeded, and what the checks found."""
    succeeded: set[str] = set()
    findings: list[Finding] = []
    for event in from_schema(load_schema(document, url, token)).execute():
        assert not isinstance(event, events.FatalError), event.exception
        assert not isinstance(event, events.NonFatalError), (event.label, event.value)
        if isinstance(event, events.ScenarioFinished):
            findings += [finding for finding in iter_findings(event.recorder) if not finding.is_excluded]
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
            "max-examples": max(settings().max_examples // 10, 5),
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


def iter_findings(recorder: Any) -> Iterator[Finding]:
    for case_id, checks in recorder.checks.items():
        for check in checks:
            if info := check.failure_info:
                response = recorder.interactions[case_id].response
                text = response.content.decode(errors="replace")
                for subject in find_subjects(response.status_code, text):
                    yield Finding(
                        check.name, info.failure.operation, subject, info.failure.message, info.code_sample, text
                    )


def find_subjects(status: int, text: str) -> list[str]:
    """Return the status with each refused field, or with the code of the problem if no field is named."""
    try:
        problem = json.loads(text)
    except ValueError:
        return [str(status)]
    if not isinstance(problem, dict) or "code" not in problem:
        return [str(status)]
    fields = [error["field"] for error in problem.get("errors", ())]
    entries = [re.sub(r'^(accounts|tenants)\.("[^"]*"|[^.]+)\.', "", field) for field in fields]
    return [f"{status} {name}" for name in entries or [problem["code"]]]
