"""Traffic of every sort, each bit of it only as much as leaves a mark."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import httpx2
from redis import Redis

from service.clients.http import THRESHOLD
from service.domain.tasks import Kind
from service.domain.webhooks import RETRY_SECONDS
from tests.monitoring.plant import LOST, Plant
from tests.process.gateway import until
from tests.support.images import png

LEASE_SECONDS = 180
WINDOWS = ("minute", "hour", "day", "month", "total")
DENIED: Mapping[str, Mapping[str, Any]] = {
    **{f"{window}-tasks": {"limits": [{"window": window, "tasks": 1}]} for window in WINDOWS},
    **{f"{window}-money": {"limits": [{"window": window, "money": 3}]} for window in WINDOWS},
    "max-active": {"max_active": 1},
    "balance": {},
}
"""A tenant for each reason to refuse, named after it; a task at the highest price fills up its limit."""
HOOKS = {"told": 204, "busy": 500, "gone": 410}
"""Tenants by what their receivers answer."""
CHECKS: Mapping[str, Mapping[str, Any]] = {
    "nothing": {"reply": "page", "status": 502},
    "silent": {"wrong": {"status": "null"}},
    "unusable": {"wrong": {"images_url": "missing", "vector_url": "missing", "grid_url": "missing"}},
}
"""What the upstream does wrong with checks of tasks, by what the watch makes of it."""
FILES: Sequence[Mapping[str, Any]] = (
    {"reply": "page", "status": 404},
    {"reply": "page", "status": 500},
    {"reply": "cut"},
)
"""What it does wrong with results."""
_ACCOUNT = {"max-active": "main", "balance": "empty"}


def furnish(plant: Plant) -> None:
    """Make all accounts and tenants, and wait until the gateway knows them."""
    plant.account("main", 1_000, 1_000, floor_count=5, floor_money=10)
    plant.account("money", 0, 1_000)
    plant.account("leaky", 20, 50)
    plant.account("empty", 0, 0)
    plant.account("unknown", 5, 5)
    plant.account("blind", 5, 5, max_price={})
    plant.account("away", 5, 5, base_url=plant.nowhere)
    plant.tenant("steady", "main", limits=[{"window": each, "tasks": 500, "money": 500} for each in WINDOWS])
    for name in ("money", "leaky", "unknown", "blind", "away"):
        plant.tenant(name, name)
    plant.tenant("two-accounts", "unknown", "main")
    for name, policy in DENIED.items():
        plant.tenant(name, _ACCOUNT.get(name, "money"), **policy)
    for name, status in HOOKS.items():
        hook = {"url": f"{plant.receiver}/{status}", "allow": ["127.0.0.0/8"]}
        plant.tenant(name, "main", webhook=hook)
    until(lambda: plant.call(name, "GET", "/v1/quota").status_code == 200, "the news of the last tenant")


def work(plant: Plant) -> None:
    """Every kind of task, to its end, as every sort of client follows it."""
    tasks = [plant.ended("steady", kind) for kind in Kind]
    tasks += [plant.ended("money", kind) for kind in Kind]
    task = tasks[0]
    for path in ("", "?limit=5", f"/{task['id']}", f"/{task['id']}/artifacts/image"):
        assert plant.call("steady", "GET", f"/v1/tasks{path}").status_code == 200, path
    for path in ("/v1/usage", "/v1/quota"):
        assert plant.call("steady", "GET", path).status_code == 200
    for kind in ("task", "vector_task", "face_enhance_task", "seamless_task"):
        form = {"user_key": plant.tokens["steady"]}, {"input_image": ("a.png", png(), "image/png")}
        old = plant.http.post(f"{plant.api.url}/api/submit_{kind}", data=form[0], files=form[1]).json()
        check = {"user_key": plant.tokens["steady"], "task_id": old["task_id"]}
        assert plant.http.post(f"{plant.api.url}/api/check_task_status", data=check).json()["err_code"] == 0
    refund = plant.admin("POST", "/refunds", json={"task": task["id"], "reason": "It came out blank."})
    assert refund["refund"]
    key = {"Idempotency-Key": '"once-and-no-more-than-once"'}
    ids = {plant.submit("steady", headers=key).json()["id"] for _ in range(2)}
    assert len(ids) == 1
    with ThreadPoolExecutor() as threads:
        running = plant.running("steady", seconds=1.5)
        followed = threads.submit(plant.call, "steady", "GET", f"{running}/events")
        waited = threads.submit(plant.call, "steady", "GET", running, headers={"Prefer": "wait=10"})
        assert waited.result().json()["state"] == "succeeded"
        assert "succeeded" in followed.result().text
    plant.upstream.dial()


def refuse(plant: Plant) -> None:
    """What the gateway refuses, and what clients do wrong."""
    for name in DENIED:
        if name == "max-active":
            plant.upstream.dial(seconds=2)
        plant.submit(name)
        until(partial(_denied, plant, name), f"a refusal by {name}")
        plant.upstream.dial()
    expected = {
        ("nobody", "GET", "/v1/quota"): 401,
        ("steady", "GET", "/v1/nothing"): 404,
        ("steady", "DELETE", "/v1/quota"): 405,
        ("steady", "POST", "/v1/tasks/upscale"): 415,
    }
    found = {each: plant.call(*each).status_code for each in expected}
    assert found == expected, found
    assert plant.http.get(f"{plant.api.ops_url}/admin/v1/accounts").status_code == 401


def disappoint(plant: Plant) -> None:
    """What the vendor does wrong, with submits, checks and results."""
    _with(plant, {"on": "submit", "fail": "it could not be done"}, lambda: _state(plant, "failed"))
    _with(plant, {"on": "submit", "reject": "too dark"}, lambda: _answered(plant, "steady", [502]))
    _with(plant, {"on": "submit", "reply": "reset"}, lambda: _answered(plant, "steady", [504]))
    for status in (301, 429):
        refused = {"on": "submit", "reply": "page", "status": status, "when": "before"}
        _with(plant, refused, lambda: _answered(plant, "steady", [503]))
    for tenant, status in (("unknown", 503), ("two-accounts", 201)):
        plant.admin("POST", "/accounts/unknown/reopen")
        _with(plant, {"on": "submit", "refuse": "账户不存在"}, partial(_answered, plant, tenant, [status]))
    nothing = {"remaining_count": "missing", "remaining_money": "missing"}
    _with(plant, {"times": None, "wrong": nothing}, lambda: _state(plant, "succeeded", "blind"))
    for answer, fault in CHECKS.items():
        _with(plant, {"on": "check", "times": None, **fault}, partial(_checked, plant, answer))
    result = f"/v1/tasks/{plant.ended('steady')['id']}/artifacts/image"
    for fault in FILES:
        _with(plant, {"on": "file", **fault}, lambda: _broken(plant, result))
    for _ in range(THRESHOLD + 1):
        _answered(plant, "away", [503])


def leak(plant: Plant) -> None:
    """Somebody else spends, both uses and money."""
    plant.ended("leaky")
    plant.hold("leaky", 15, 50)
    plant.ended("leaky")
    plant.hold("leaky", 14, 40)
    plant.ended("leaky")
    unexplained = plant.admin("GET", "/accounts/leaky")["unexplained"]
    assert unexplained["count"] > 0, unexplained
    assert unexplained["money"] > 0, unexplained


def notify(plant: Plant) -> None:
    """Tell receivers of ends: one that hears it, one that fails, and one that is gone."""
    for name in HOOKS:
        plant.ended(name)


def lose_the_store(plant: Plant, noticed: Callable[[], bool]) -> None:
    """The store refuses writes; then it is away, until that was noticed."""
    task = plant.running("steady")
    with Redis(unix_socket_path=str(plant.store.path)) as client:
        client.config_set("min-replicas-to-write", 1)
        _answered(plant, "steady", [503])
        client.config_set("min-replicas-to-write", 0)
    with plant.store_away():
        assert plant.call("steady", "GET", task).status_code == 200
        _answered(plant, "steady", [503])
        until(noticed, "word of a store that is away")
    until(lambda: plant.call("steady", "GET", "/v1/tasks").status_code == 200, "the return of the store")
    plant.upstream.dial()


def leave(plant: Plant) -> None:
    """A client leaves, and a submission takes longer than its lease: it is given up."""
    _hang_up(plant, plant.running("steady"))
    before = plant.upstream.count("submit")
    plant.upstream.dial({"on": "submit", "times": 1, "latency": 8, "reply": "reset"})
    with ThreadPoolExecutor() as threads:
        submitting = threads.submit(plant.submit, "steady")
        until(lambda: plant.upstream.count("submit") > before, "the submit")
        plant.pass_by(LEASE_SECONDS)
        until(lambda: plant.counted("gateway_reservations_expired_total") > 0, "the end of a lease")
        assert submitting.result().status_code == 504


def give_up(plant: Plant) -> None:
    """Let time pass until the receiver that fails was tried for the last time."""
    while not plant.counted("gateway_webhook_attempts_total", state="failed"):
        before = plant.counted("gateway_webhook_attempts_total")
        plant.pass_by(2 * max(RETRY_SECONDS))
        until(partial(_attempted, plant, before), "another attempt")
    given_up = plant.admin("GET", "/webhooks/failed")["items"]
    plant.admin("POST", f"/webhooks/{given_up[0]['id']}/redeliver")


def _attempted(plant: Plant, before: float) -> bool:
    return plant.counted("gateway_webhook_attempts_total") > before


def _denied(plant: Plant, tenant: str) -> bool:
    """Submit, and say whether that was refused. At the turn of a minute, the limit of minutes begins anew."""
    return plant.submit(tenant).status_code in {402, 429}


def _with(plant: Plant, fault: Mapping[str, Any], act: Callable[[], None]) -> None:
    plant.upstream.dial({"times": 1, **fault})
    act()
    plant.upstream.dial()


def _checked(plant: Plant, answer: str) -> None:
    """Have a task checked until that had some answer."""
    plant.accepted("steady")
    until(lambda: plant.counted("gateway_watch_checks_total", answer=answer) > 0, f"a check that is {answer}")


def _state(plant: Plant, state: str, tenant: str = "steady") -> None:
    assert plant.ended(tenant)["state"] == state


def _answered(plant: Plant, tenant: str, statuses: Sequence[int]) -> None:
    answer = plant.submit(tenant)
    assert answer.status_code in statuses, answer.text


def _broken(plant: Plant, path: str) -> None:
    """A result that can't be had: that is said, or it breaks off."""
    with suppress(httpx2.RemoteProtocolError):
        assert plant.call("steady", "GET", path).status_code in LOST


def _hang_up(plant: Plant, path: str) -> None:
    """Wait for the end of a task, and leave before it."""
    url = httpx2.URL(plant.api.url)
    request = f"GET {path} HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {plant.tokens['steady']}\r\n"
    with socket.create_connection((url.host, url.port)) as client:
        client.sendall(f"{request}Prefer: wait=60\r\n\r\n".encode())
        until(lambda: plant.counted("gateway_waiting_clients") > 0, "a client that waits")
    until(lambda: plant.counted("gateway_http_requests_total", status="499") > 0, "word that it left")
    plant.upstream.dial()
