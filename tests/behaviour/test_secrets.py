"""Secrets and user content in responses, logs, traces and Redis."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn
from urllib.parse import quote, quote_plus

import pytest
import structlog
from httpx2 import BasicAuth, Response
from redis.asyncio import Redis
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from service.clients import vendor_api, webhooks
from service.clients.http import UpstreamPool
from service.sandbox.faults import Fault
from service.telemetry.logging import configure_logging
from service.telemetry.redaction import Redactor
from service.usecases.reports import QuotaReports
from tests.behaviour.clients import LegacyClient
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, SECRET_KEY, USER_KEY, RunningGateway, run_real_gateway
from tests.behaviour.webhook_receiver import WebhookReceiver, make_secret, run_receiver
from tests.contract.scripted_server import PNG_IMAGE, Connection, file_response, run_server, vendor_response
from tests.support.traces import run_collector
from tests.support.valkey import Valkey

OTHER_KEY = "an/odd-key+of='another'\"account\"\\"
HOOK_SECRET = make_secret(b"h")
ENCODED_SECRET_KEY = base64.b64encode(SECRET_KEY).decode()
QUERY = "canary-of-the-query"
PROMPT = "canaryprompt \"with\" 'quotes', {braces} & canaryend"
METADATA = {"order": "canarymetadata }, ) canaryend"}
IDEMPOTENCY_KEY = "canary-of-the-idempotency-key"
PASSWORD = "canary-of-the-password"
CANARIES = ("canaryprompt", "canarymetadata", "canaryend", QUERY, IDEMPOTENCY_KEY, PASSWORD)


class CapturedLog:
    def __init__(self) -> None:
        self.stream = io.BytesIO()
        self.redactor = Redactor()

    @property
    def text(self) -> str:
        return self.stream.getvalue().decode()


@contextmanager
def capture_log() -> Iterator[CapturedLog]:
    """Log everything within the block at debug level, including libraries."""
    captured, root = CapturedLog(), logging.getLogger()
    handlers = list(root.handlers)
    levels = {name: logging.getLogger(name).level for name in ("root", *logging.Logger.manager.loggerDict)}
    root.handlers.clear()  # they would be closed
    try:
        configure_logging(json=True, level="DEBUG", stream=captured.stream, redactor=captured.redactor)
        for name in levels:
            logging.getLogger(name).setLevel(logging.DEBUG)
        yield captured
    finally:
        root.handlers[:] = handlers
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        structlog.reset_defaults()


def encode_secret(secret: str) -> Mapping[str, str]:
    """Return encodings of a secret, each with the part that would reveal it."""
    plain = secret.encode()
    whole = {secret, repr(secret)[1:-1], repr(plain)[2:-1], quote(secret, safe=""), quote_plus(secret), plain.hex()}
    whole |= {json.dumps(secret)[1:-1], json.dumps(json.dumps(secret))[3:-3], base64.b64encode(plain).decode()}
    within = [base64.b64encode(b"user:"[:letters] + plain + b"end").decode() for letters in (1, 2, 3, 4, 5)]
    return {item: item for item in whole} | {item: item[8:-8] for item in within}


def assert_no_secret(texts: list[bytes], *secrets: str) -> None:
    for secret in secrets:
        for revealing in encode_secret(secret).values():
            assert [text for text in texts if revealing.encode() in text] == [], revealing


async def test_changes_are_logged(gateway: RunningGateway) -> None:
    with capture_logs(processors=[merge_contextvars]) as logged:
        await gateway.call_admin("PUT", "/accounts/main", json={"floor_count": 2, "user_key": OTHER_KEY})
        await gateway.put_tenant(max_active=4)
        made = (await gateway.call_admin("POST", "/tenants/shop/tokens", json={"label": "a label"})).json()
        await gateway.call_admin("DELETE", f"/tenants/shop/tokens/{made['id']}?grace=60")
        await gateway.call_admin("POST", "/accounts/main/reopen")
        await gateway.call_admin("DELETE", "/tenants/shop")
        await gateway.call_admin("DELETE", "/accounts/main")
        spare, lab = {"user_key": {"value": OTHER_KEY}}, {"accounts": [], "max_active": 3}
        document = {"accounts": {"spare": spare}, "tenants": {"lab": lab}}
        await gateway.call_admin("PUT", "/registry", json=document)
    assert_no_secret([repr(item).encode() for item in logged], OTHER_KEY, made["token"])  # before they are redacted
    changes = [item for item in logged if item["event"].startswith(("account.", "tenant.", "token.", "registry."))]
    expected: list[tuple[str, dict[str, Any]]] = [
        ("account.updated", {"account": "main", "floor_count": 2}),
        ("tenant.updated", {"tenant": "shop", "max_active": 4}),
        ("token.created", {"tenant": "shop", "id": made["id"], "label": "a label"}),
        ("token.revoked", {"tenant": "shop", "id": made["id"], "grace": 60}),
        ("account.reopened", {"account": "main"}),
        ("tenant.deleted", {"tenant": "shop"}),
        ("account.deleted", {"account": "main"}),
        ("registry.applied", {}),
        ("account.updated", {"account": "spare"}),
        ("tenant.updated", {"tenant": "lab", "max_active": 3}),
    ]
    for change, (event, fields) in zip(changes, expected, strict=True):
        assert fields.items() | {"event": event}.items() <= change.items()
        assert change["request_id"]


async def test_redis_holds_no_secret(gateway: RunningGateway, valkey: Valkey) -> None:
    other = await gateway.new_token(label="another")
    await gateway.call_admin("PUT", "/accounts/spare", json={"user_key": OTHER_KEY})
    await gateway.put_tenant(webhook={"url": "https://h.example/", "secret": HOOK_SECRET})
    rotated = (await gateway.call_admin("POST", "/tenants/shop/webhook-secret?grace=60")).json()["secret"]
    task = (await gateway.submit("upscale", {"prompt": "a prompt"})).json()
    async with Redis(unix_socket_path=str(valkey.socket_path)) as store:
        await store.config_set("rdbcompression", "no")
        for _ in range(2):
            dumps = [key + (await store.dump(key) or b"") async for key in store.scan_iter()]
            assert any(b"spare" in item for item in dumps), "the registry is missing"
            assert any(b"a prompt" in item for item in dumps), "the tasks are missing"
            assert_no_secret(dumps, USER_KEY, OTHER_KEY, gateway.token, other, ADMIN_TOKEN, HOOK_SECRET, rotated)
            assert not [item for item in dumps if base64.b64decode(HOOK_SECRET[6:]) in item]
            await gateway.wait_for_task(task["id"])


async def test_a_link_with_the_key_is_neither_shown_nor_stored(gateway: RunningGateway, valkey: Valkey) -> None:
    spellings = [USER_KEY, USER_KEY.title(), "".join(f"%{octet:02X}" for octet in USER_KEY.encode())]
    spellings += [quote(USER_KEY.replace("-", "%2d")), USER_KEY.encode().hex().upper()]
    spellings += [base64.urlsafe_b64encode(b"x" * letters + USER_KEY.encode()).decode() for letters in range(3)]
    link = ""

    async def serve(connection: Connection) -> None:
        while head := await connection.receive():
            image = file_response(ETag=f'"{link}"', Last_Modified=spellings[0])
            task = vendor_response(err_code=0, task_id=f"t{len(link)}", status="Completed", images_url=link)
            await connection.send(task if head.startswith("POST") else image)

    async with run_server(serve) as server, Redis(unix_socket_path=str(valkey.socket_path)) as store:
        await gateway.call_admin("PUT", "/accounts/main", json={"user_key": USER_KEY, "base_url": server.url})
        await store.config_set("rdbcompression", "no")
        for spelling in spellings:
            link = f"/{spelling}/1.png?k={spelling}"
            task = await gateway.wait_for_task((await gateway.submit()).json()["id"])
            checked = await LegacyClient(gateway.http, gateway.url, gateway.token).check(task["id"])
            fetched = await gateway.call("GET", task["artifacts"][0]["href"])
            assert (fetched.content, server.requests[-1][0].split()[1]) == (PNG_IMAGE, link.encode())
            dumps = [await store.dump(name) or b"" for name in await store.keys()]
            assert any(b"/1.png" in item for item in dumps)
            texts = [json.dumps([task, checked]).encode(), repr(fetched.headers).encode(), *dumps]
            assert [text for text in texts if spelling[4:-4].lower().encode() in text.lower()] == [], spelling


def make_exceptions(token: str) -> list[Exception]:
    """Make exceptions that contain secrets and user content."""
    errors: list[Exception] = []
    for secret in (USER_KEY, OTHER_KEY, token, ADMIN_TOKEN, HOOK_SECRET):
        errors += [RuntimeError(f"can't use <{item}> or {item.encode()!r}") for item in encode_secret(secret)]
    options = {"kind": "upscale", "prompt": PROMPT, "negative_prompt": PROMPT}
    return [
        *errors,
        ValueError(f"no options: {options}", json.dumps({"inner": json.dumps(options)})),
        KeyError(f"metadata={METADATA!r}", {"metadata": METADATA}),
        OSError(f"http://shop:{PASSWORD}@hooks.example/ended?key={QUERY}#x is away"),
        OSError([(b"authorization", PASSWORD.encode()), ("cookie", PASSWORD), ["x-api-key", PASSWORD]]),
        OSError(f"Idempotency-Key: {IDEMPOTENCY_KEY}", {"Idempotency-Key": IDEMPOTENCY_KEY}),
    ]


def raise_all(errors: list[Exception]) -> NoReturn:
    """Raise all errors: as a group, as its cause, and in its notes."""
    prompt, metadata, secret = PROMPT, METADATA, PASSWORD  # a traceback with variables would contain them
    error = ExceptionGroup(f"a crash of {len(prompt) + len(metadata) + len(secret)}", errors)
    for item in errors:
        error.add_note(str(item))
    raise error from errors[-1]


async def call_as_operator(gateway: RunningGateway) -> None:
    for body in ({"user_key": OTHER_KEY}, {"user_key": OTHER_KEY, OTHER_KEY: 1}, {"user_key": [OTHER_KEY]}):
        await gateway.call_admin("PUT", "/accounts/spare", json=body)
    await gateway.call_admin("PUT", "/accounts/spare", content=json.dumps({"user_key": OTHER_KEY})[:-2].encode())
    for value in (OTHER_KEY, [OTHER_KEY]):
        document = {"accounts": {"spare": {"user_key": {"value": value}}}}
        await gateway.call_admin("PUT", "/registry", json=document)
    await gateway.call_admin("PUT", "/registry?dry_run=true&prune=true&force=true", json={})
    for path in ("/accounts", "/tenants", "/registry"):
        await gateway.call_admin("GET", path)
    await gateway.http.get(f"{gateway.ops_url}/metrics")
    await gateway.call_admin("PUT", "/tenants/other", json={"accounts": ["main"], "webhook": {"secret": HOOK_SECRET}})
    await gateway.call_admin("GET", f"/accounts?token={ADMIN_TOKEN}&user_key={quote(OTHER_KEY)}")
    await gateway.call_admin("GET", f"/accounts/{quote(OTHER_KEY, safe='')}")
    for path in (f"/{ADMIN_TOKEN}", f"/admin/v1/{gateway.token}?{QUERY}", f"/metrics?user={QUERY}"):
        await gateway.http.get(gateway.ops_url + path, auth=BasicAuth("operator", ADMIN_TOKEN))


async def call_as_tenant(gateway: RunningGateway) -> None:
    fields = {"prompt": PROMPT, "metadata": json.dumps(METADATA)}
    headers = {"Idempotency-Key": f'"{IDEMPOTENCY_KEY}"', "Cookie": f"session={PASSWORD}"}
    headers |= {"X-Request-Id": gateway.token, "User-Agent": f"curl {gateway.token}"}
    faulty = {"webhook_url": f"https://u:{PASSWORD}@h.example/?{QUERY}"}
    for more in ({}, {"scale": "none"}, {gateway.token: "x"}, faulty):
        await gateway.submit("upscale", fields | more, headers=headers)
    await gateway.submit("upscale", fields, image=PROMPT.encode())
    body = f'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n{PROMPT}'
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    await gateway.call("POST", "/v1/tasks/upscale", content=body.encode(), headers=form)
    for path in (f"/v1/tasks/{gateway.token}", f"/v1/quota?access_token={gateway.token}", f"/v1/{quote(OTHER_KEY)}"):
        await gateway.call("GET", path)
    await gateway.call("GET", "/v1/quota", token=gateway.token[:-1])
    await gateway.call("GET", "/v1/quota", headers={"X-Request-Id": USER_KEY})
    old = LegacyClient(gateway.http, gateway.url, gateway.token)
    await old.submit("submit_task", {"prompt": PROMPT})
    await old.check(gateway.token)
    await LegacyClient(gateway.http, gateway.url, USER_KEY).submit("submit_task", {"prompt": PROMPT})


async def provoke_upstream_faults(gateway: RunningGateway, receiver: WebhookReceiver) -> None:
    hook = {"url": f"{receiver.url}?key={QUERY}", "secret": HOOK_SECRET, "allow": [receiver.network]}
    await gateway.put_tenant(webhook=hook)
    echoes = [f"任务提交失败:{item}" for item in encode_secret(USER_KEY)]
    faulty = [
        *(Fault(on="submit", times=1, refuse=echo) for echo in echoes),
        Fault(on="submit", times=1, fail=f"{USER_KEY} {PROMPT}"),
        Fault(on="submit", times=1, reply="page"),
        Fault(on="submit", times=1, reply="reset"),
        Fault(on="check", times=1, reply="reset"),
    ]
    receiver.statuses += [500, 410]
    for fault in faulty:
        await gateway.upstream.update_behaviour(faults=(fault,))
        response = await gateway.submit(fields={"metadata": json.dumps(METADATA)})
        if response.status_code == 201:
            await gateway.wait_for_task(response.json()["id"])
            await gateway.deliver_due_webhooks()


async def provoke_crashes(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = make_exceptions(gateway.token)

    async def failing(*_: Any, **__: Any) -> NoReturn:
        raise_all(errors)

    await gateway.put_tenant(webhook={"url": f"https://h.example/?{QUERY}", "secret": HOOK_SECRET})
    task = (await gateway.submit()).json()["id"]
    monkeypatch.setattr(vendor_api, "parse_check_response", lambda *_: raise_all(errors))
    await gateway.upstream.wait_until_idle()
    await gateway.advance(60)
    await gateway.services.task_poller.start_due()
    await gateway.services.task_poller.wait_idle()
    monkeypatch.undo()
    monkeypatch.setattr(webhooks, "GuardedTransport", lambda *_, **__: raise_all(errors))
    await gateway.advance(60)
    await gateway.wait_for_task(task)
    await gateway.deliver_due_webhooks()
    monkeypatch.setattr(UpstreamPool, "post", failing)
    await gateway.submit("upscale", {"prompt": PROMPT})
    monkeypatch.setattr(QuotaReports, "for_tenant", failing)
    await gateway.call("GET", "/v1/quota")
    asyncio.get_running_loop().call_exception_handler(
        {"message": f"lost {errors}", "exception": errors[0], "task": errors}
    )


async def test_no_secret_in_responses_traces_and_the_log_at_debug_level(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses: list[Response] = []

    async def record_response(response: Response) -> None:
        await response.aread()
        if "x-request-id" not in response.request.headers:  # which every response repeats
            responses.append(response)

    with capture_log() as log, run_collector() as collector:
        log.redactor.register_secrets(ADMIN_TOKEN, ENCODED_SECRET_KEY)
        settings = {"GATEWAY_TRACES_URL": collector.url}
        async with run_real_gateway(valkey, log.redactor, **settings) as gateway, run_receiver() as receiver:
            gateway.http.event_hooks["response"].append(record_response)
            await call_as_operator(gateway)
            await call_as_tenant(gateway)
            await provoke_upstream_faults(gateway, receiver)
            await provoke_crashes(gateway, monkeypatch)
    events = [json.loads(line) for line in log.text.splitlines()]
    expected = {"request.ended", "request.error", "submission.error", "check.error", "task.finished"}
    expected |= {"upstream.request_failed", "webhook.attempted", "webhook.client_error", "account.updated"}
    assert {event["event"] for event in events} > expected
    assert {event["logger"] for event in events if event["event"] == "library.logged"} >= {"httpx2", "asyncio"}
    texts = [text.encode() for event in events for text in iter_texts(event)]
    assert len(collector.spans) > 40
    texts += collector.bodies
    for canary in CANARIES:
        assert [text for text in texts if canary.encode() in text] == [], canary
    assert {response.status_code for response in responses} >= {200, 201, 400, 401, 404, 422, 500, 502}
    texts += [repr((dict(item.headers), item.content)).encode() for item in responses]
    # The last character of the token is missing in one request.
    secrets = USER_KEY, OTHER_KEY, gateway.token[:-1], ADMIN_TOKEN, HOOK_SECRET, ENCODED_SECRET_KEY
    assert_no_secret(texts, *secrets)


def iter_texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(text for item in value.values() for text in iter_texts(item))]
    if isinstance(value, list):
        return [text for item in value for text in iter_texts(item)]
    return [value] if isinstance(value, str) else []
