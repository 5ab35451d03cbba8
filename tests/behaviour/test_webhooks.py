"""Tenants are told of the ends of their tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import structlog
from redis.asyncio import Redis

from service.container import assembled
from service.settings import Settings
from service.storage.deliveries import LEASE
from service.storage.redis import Keys
from tests.behaviour.house import ENVIRONMENT, POLL_SECONDS, House, real_house
from tests.behaviour.old_client import OldClient
from tests.behaviour.openapi_reader import fits, resolved
from tests.behaviour.receiver import Receiver, a_secret, receiving
from tests.support.valkey import Valkey

SECRET = a_secret()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as found:
        yield found


async def let_in(house: House, receiver: Receiver, *more: str, secret: str = SECRET) -> None:
    """Give the tenant `shop` a webhook."""
    hook = {"url": f"{receiver.url}?key=hidden", "secret": secret, "allow": ["127.0.0.0/8", *more]}
    await house.put_tenant(webhook=hook)


async def deliver(house: House) -> None:
    """Send all that is due now."""
    while await house.services.deliver.tick():
        await house.services.deliver.settled()


async def ended(house: House, **fields: str) -> str:
    """The id of a task that has ended, and was told of if it could be."""
    answer = await house.submit(fields=fields)
    assert answer.status_code == 201, answer.text
    task = await house.finished(answer.json()["id"])
    await deliver(house)
    return str(task["id"])


async def test_told(house: House, receiver: Receiver) -> None:
    """The tenant is told the task as it can read it, once, and can tell that it was the gateway."""
    await let_in(house, receiver)
    task_id = await ended(house)
    await deliver(house)
    (told,) = receiver.told
    assert told.path == "/ended?key=hidden"
    assert told.event["type"] == "task.succeeded"
    assert told.event["data"] == (await house.call("GET", f"/v1/tasks/{task_id}")).json()
    assert told.signed_by(SECRET)
    assert not told.signed_by(a_secret(b"x"))


async def test_documented(house: House, receiver: Receiver) -> None:
    """What a tenant is told, and with which headers, is what the API's document says."""
    await let_in(house, receiver)
    await ended(house)
    document = (await house.call("GET", "/openapi.json", token="")).json()
    operation = resolved(document, document["webhooks"]["task-ended"])["post"]
    content = operation["requestBody"]["content"]["application/json"]
    for event in (receiver.told[0].event, content["example"]):
        fits(document, event, content["schema"], "event")
    assert {each["name"] for each in operation["parameters"]} <= receiver.told[0].headers.keys()


async def test_failure(house: House, receiver: Receiver) -> None:
    """A task that failed is told too."""
    await let_in(house, receiver)
    await house.upstream.fail_next_task()
    await ended(house)
    assert receiver.told[0].event["type"] == "task.failed"


async def test_own_address(house: House, receiver: Receiver) -> None:
    """A task can name another address, at a host that is allowed."""
    await let_in(house, receiver)
    await ended(house, webhook_url="", metadata="")  # both are optional, and not given
    (at_the_usual,) = receiver.told
    assert at_the_usual.event["data"]["metadata"] == {}
    receiver.told.clear()
    async with receiving() as other:
        await ended(house, webhook_url=f"{other.url}/4711")
        assert [each.path for each in other.told] == ["/ended/4711"]
        assert other.told[0].signed_by(SECRET)
    assert not receiver.told


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/latest", "https://hooks.elsewhere.test/", "ftp://127.0.0.1/", " ", "/ended"]
)
async def test_address_that_is_not_allowed(house: House, receiver: Receiver, url: str) -> None:
    """Another address is refused by the name of its field, before anything is sent or counted."""
    await let_in(house, receiver)
    answer = await house.submit(fields={"webhook_url": url})
    assert answer.status_code == 422
    assert [each["field"] for each in answer.json()["errors"]] == ["webhook_url"]
    assert await house.upstream.submits() == 0


async def test_without_a_webhook(house: House) -> None:
    """A tenant that has no webhook can't name an address, not even one of a public host."""
    answer = await house.submit(fields={"webhook_url": "https://hooks.test/"})
    assert answer.json()["code"] == "invalid-options"


async def test_address_under_a_key(house: House, receiver: Receiver) -> None:
    """Under an idempotency key, another address is another submission."""
    await let_in(house, receiver)
    key = {"Idempotency-Key": '"once"'}
    codes = [
        (await house.submit(fields=fields, headers=key)).status_code
        for fields in ({}, {}, {"webhook_url": f"{receiver.url}/4711"})
    ]
    assert codes == [201, 201, 422]


async def test_again(house: House, receiver: Receiver) -> None:
    """What was not taken comes again later, with the same id and body."""
    await let_in(house, receiver)
    receiver.statuses = [500]
    await ended(house)
    await deliver(house)
    assert len(receiver.told) == 1
    await house.advance(5)
    await deliver(house)
    first, second = receiver.told
    assert (first.body, first.headers["webhook-id"]) == (second.body, second.headers["webhook-id"])


async def test_secret_is_shown_once(house: House, receiver: Receiver) -> None:
    """A secret that is made is shown by the call that made it and by no other, and stays whatever is put later."""
    body = {"accounts": ["main"], "webhook": {"url": receiver.url, "allow": ["127.0.0.0/8"]}}
    made = (await house.admin("PUT", "/tenants/shop", json=body)).json()["webhook"]["secret"]
    assert made.startswith("whsec_")
    shown = {"url": receiver.url, "allow": ["127.0.0.0/8"], "switched_off": []}
    assert (await house.admin("GET", "/tenants/shop")).json()["webhook"] == shown
    assert (await house.admin("PUT", "/tenants/shop", json={"accounts": ["main"]})).json()["webhook"] is None
    assert (await house.admin("PUT", "/tenants/shop", json=body)).json()["webhook"] == shown
    await ended(house)
    assert receiver.told[0].signed_by(made)


@pytest.mark.parametrize(
    ("webhook", "field"),
    [
        ({"url": "hooks.test"}, "webhook.url"),
        ({"url": "https://user:secret@hooks.test/"}, "webhook.url"),
        ({"url": "https://hooks.test/", "allow": ["hooks.test", "10.0.0.1/8"]}, "webhook.allow[1]"),
        ({"url": "https://hooks.test/", "secret": "whsec_c2hvcnQ="}, "webhook.secret"),
        ({"url": "https://hooks.test/", "secret": "c" * 44}, "webhook.secret"),
    ],
)
async def test_misuse(house: House, webhook: dict[str, object], field: str) -> None:
    """What can't be meant is refused by the name of its field, and no secret is repeated."""
    answer = await house.admin("PUT", "/tenants/shop", json={"accounts": ["main"], "webhook": webhook})
    assert answer.status_code == 422
    assert [each["field"] for each in answer.json()["errors"]] == [field]
    assert str(webhook.get("secret")) not in answer.text


async def test_rotation(house: House, receiver: Receiver) -> None:
    """During the grace both secrets sign, and the new one is shown once."""
    await let_in(house, receiver)
    answer = await house.admin("POST", "/tenants/shop/webhook-secret?grace=3600")
    assert answer.status_code == 201
    new = answer.json()["secret"]
    await ended(house)
    assert receiver.told[0].signed_by(SECRET)
    assert receiver.told[0].signed_by(new)
    newer = (await house.admin("POST", "/tenants/shop/webhook-secret")).json()["secret"]
    await ended(house)
    assert receiver.told[1].signed_by(newer)
    assert not receiver.told[1].signed_by(new)


async def test_nothing_to_rotate(house: House) -> None:
    """Where there is no secret there is none to rotate."""
    assert (await house.admin("POST", "/tenants/shop/webhook-secret")).status_code == 409
    assert (await house.admin("POST", "/tenants/nobody/webhook-secret")).status_code == 404


async def test_gone(house: House, receiver: Receiver) -> None:
    """An address that is gone is switched off, listed, and called again once the tenant is put and an operator asks."""
    await let_in(house, receiver)
    receiver.statuses = [410]
    task_id = await ended(house)
    await ended(house)
    assert len(receiver.told) == 1
    assert (await house.admin("GET", "/tenants/shop")).json()["webhook"]["switched_off"] == [receiver.url]
    items = (await house.admin("GET", "/webhooks/failed")).json()["items"]
    assert [each["state"] for each in items] == ["off", "off"]
    oldest = items[-1]
    assert (oldest["tenant"], oldest["task"], oldest["url"]) == ("shop", task_id, receiver.url)
    assert (oldest["attempts"], oldest["status"], oldest["answer"]) == (1, 410, "no")
    assert len((await house.admin("GET", "/webhooks/failed?limit=1")).json()["items"]) == 1
    await let_in(house, receiver)
    again = await house.admin("POST", f"/webhooks/{oldest['id']}/redeliver")
    assert (again.status_code, again.json()["state"], again.json()["attempts"]) == (200, "pending", 0)
    await deliver(house)
    first, second = receiver.told
    assert (first.body, first.headers["webhook-id"]) == (second.body, oldest["id"])
    assert len((await house.admin("GET", "/webhooks/failed")).json()["items"]) == 1


async def test_unknown_delivery(house: House) -> None:
    """What is not known can't be sent again."""
    for event in ("msg_" + "0" * 32, "nonsense"):
        assert (await house.admin("POST", f"/webhooks/{event}/redeliver")).status_code == 404


async def test_old_clients(house: House, receiver: Receiver) -> None:
    """Tasks that old clients submit are told to the tenant's own address."""
    await let_in(house, receiver)
    client = OldClient(house.http, house.url, house.token)
    task_id = (await client.submit("submit_face_enhance_task"))["task_id"]
    await client.ended(task_id, house.watch)
    await deliver(house)
    assert [each.event["data"]["id"] for each in receiver.told] == [task_id]


async def test_killed_process(valkey: Valkey, receiver: Receiver) -> None:
    """What a process was killed over before it could write it down comes again from another one, the same."""
    environment = ENVIRONMENT | {"GATEWAY_REDIS_URL": valkey.url, "GATEWAY_UPSTREAM_URL": "http://localhost:1"}
    async with real_house(valkey) as house, assembled(Settings.load(environment)) as other:
        await let_in(house, receiver)
        await other.registry.refresh()
        task_id = (await house.submit()).json()["id"]
        await house.finished(task_id)
        receiver.silent = True
        job = asyncio.create_task(house.services.deliver.run())
        await receiver.asked.wait()
        job.cancel()
        await asyncio.wait([job])
        receiver.silent = False
        while await other.deliver.tick():
            await other.deliver.settled()
        assert len(receiver.told) == 1
        await house.advance(LEASE / 1000)
        while await other.deliver.tick():
            await other.deliver.settled()
    first, second = receiver.told
    assert (first.headers["webhook-id"], first.body) == (second.headers["webhook-id"], second.body)


async def test_store_that_lost_the_task(valkey: Valkey, receiver: Receiver) -> None:
    """The end of a task that the store had lost is told to the tenant's own address."""
    async with real_house(valkey) as house:
        await let_in(house, receiver)
        task_id = (await house.submit()).json()["id"]
        async with Redis.from_url(valkey.url) as client:
            gone = [key async for key in client.scan_iter() if b":task" in key or b":reservation" in key]
            await client.delete(*gone, Keys("gw").watch)
        await house.advance(0)
        await house.call("GET", f"/v1/tasks/{task_id}")
        await house.finished(task_id)
        await deliver(house)
    assert [each.event["data"]["id"] for each in receiver.told] == [task_id]


async def test_awaited(house: House, receiver: Receiver) -> None:
    """A task whose end is told is asked about as often as one that somebody waits for, however old it is."""
    await let_in(house, receiver)
    await house.upstream.keep_running()
    assert (await house.submit()).status_code == 201
    await house.advance(600)
    await house.watch()
    before = await house.upstream.checks()
    await house.advance(POLL_SECONDS)
    await house.watch()
    assert await house.upstream.checks() > before


async def test_secrets_stay_secret(valkey: Valkey, receiver: Receiver) -> None:
    """No secret is in the store or in the log, however it got there, and neither is the query of an address."""
    with structlog.testing.capture_logs() as logged:
        async with real_house(valkey) as house:
            await let_in(house, receiver)
            made = (await house.admin("POST", "/tenants/shop/webhook-secret?grace=60")).json()["secret"]
            receiver.statuses = [500]
            await ended(house)
            async with Redis.from_url(valkey.url) as client:
                stored = b"".join([key + (await client.dump(key) or b"") async for key in client.scan_iter()])
    assert b"shop" in stored
    assert any(each["event"] == "delivery.attempted" for each in logged)
    for secret in (SECRET, made):
        assert secret.removeprefix("whsec_") not in str(logged)
        assert secret.removeprefix("whsec_").encode() not in stored
    assert b"s" * 32 not in stored
    assert "hidden" not in str(logged)
