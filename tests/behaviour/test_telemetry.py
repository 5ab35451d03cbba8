"""Metrics of tenants, accounts and the store, and traces from the submission to the webhook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from service.usecases import caches, ledger_snapshot
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway, run_real_gateway
from tests.behaviour.requests import advance_to_next_window, expect_problem, post_refund, read_usage, run_task
from tests.behaviour.webhook_receiver import make_secret, run_receiver
from tests.support.traces import SPAN, TRACE, TraceCollector, run_collector
from tests.support.valkey import Valkey, run_valkey


async def scrape_metrics(gateway: RunningGateway, headers: Mapping[str, str] | None = None) -> list[Sample]:
    text = (await gateway.http.get(f"{gateway.ops_url}/metrics", headers=headers)).raise_for_status().text
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def sum_samples(samples: list[Sample], name: str, **labels: str) -> float | None:
    """Return the sum of the samples with these labels, or None without any."""
    values = [
        item.value for item in samples if item.name == f"gateway_{name}" and labels.items() <= item.labels.items()
    ]
    return sum(values) if values else None


async def test_task_moves_through_the_metrics(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "FINISHED_TTL_SECONDS", 60)  # on a slow machine the store would be read twice
    await gateway.put_tenant(limits=[{"window": "day", "tasks": 9, "money": 50}])
    await gateway.put_tenant("idle", limits=[{"window": "month", "tasks": 7, "money": 2.5}], max_active=4)
    of_shop = {"tenant": "shop", "kind": "face-enhance"}
    created = await gateway.submit()
    running = await scrape_metrics(gateway)
    assert sum_samples(running, "tasks_active", **of_shop) == 1
    assert sum_samples(running, "quota_used", tenant="shop", policy="day-tasks") == 1
    assert sum_samples(running, "tasks_submitted_total", **of_shop) == 1
    assert sum_samples(running, "account_open_submissions", account="main") == 1
    assert sum_samples(running, "poll_tasks") == 1
    for policy, unit, limit in (("month-tasks", "tasks", 7), ("month-money", "yuan", 2.5), ("max-active", "active", 4)):
        of_idle = {"tenant": "idle", "policy": policy, "unit": unit}
        values = [sum_samples(running, f"quota_{name}", **of_idle) for name in ("limit", "used", "reserved")]
        assert values == [limit, 0, 0]
    assert sum_samples(running, "tasks_active", tenant="idle", kind="upscale") == 0
    await gateway.wait_for_task(created.json()["id"])
    await gateway.advance(1)
    before = await scrape_metrics(gateway)
    for _ in range(3):
        assert (await gateway.call("GET", created.headers["location"])).status_code == 200
    ended = await scrape_metrics(gateway)
    for source, count in {"memory": 2, "store": 1, "upstream": 0}.items():
        samples = [sum_samples(scrape, "task_reads_total", source=source) or 0 for scrape in (before, ended)]
        assert samples[1] - samples[0] == count, source
    assert sum_samples(ended, "tasks_active", tenant="shop") == 0
    assert sum_samples(ended, "tasks_finished_total", **of_shop, state="succeeded") == 1
    assert sum_samples(ended, "spent_uses_total", **of_shop) == 1
    assert sum_samples(ended, "account_remaining_uses", account="main") == 9
    assert sum_samples(ended, "poll_tasks") == 0
    for status in ("500", "502", "503", "504"):  # zero before the first: `rate()` would miss that one
        route = {"method": "GET", "port": "tenants", "route": "/v1/tasks/{task_id}", "status": status}
        assert sum_samples(ended, "http_requests_total", **route) == 0


async def test_metrics_need_the_token_that_is_set(valkey: Valkey) -> None:
    """With GATEWAY_METRICS_TOKEN, /metrics wants that token and no other, and it opens nothing else."""
    token = "metrics-token-of-the-tests"
    async with run_real_gateway(valkey, GATEWAY_METRICS_TOKEN=token) as gateway:
        for wrong in ({}, {"Authorization": f"Bearer {ADMIN_TOKEN}"}, {"Authorization": f"Bearer {token}x"}):
            refused = await gateway.http.get(f"{gateway.ops_url}/metrics", headers=wrong)
            expect_problem(refused, 401, "unauthenticated")
            assert refused.headers["www-authenticate"].startswith("Bearer")
        own = {"Authorization": f"Bearer {token}"}
        assert sum_samples(await scrape_metrics(gateway, own), "authentication_failures_total", port="operators") == 3
        expect_problem(await gateway.call_admin("GET", "/accounts", headers=own), 401, "unauthenticated")


async def test_spent_money_is_shown_in_yuan(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(0, 300)
    await gateway.put_tenant(limits=[{"window": "day", "money": 50}])
    for _ in range(2):  # the cost of the first one is unknown: no balance was known before it
        await gateway.wait_for_task((await gateway.submit()).json()["id"])
    quota = (await gateway.call("GET", "/v1/quota")).json()
    (used,) = (policy["used"] for policy in quota["policies"] if policy["policy"] == "day-money")
    assert used > 0
    scrape = await scrape_metrics(gateway)
    assert sum_samples(scrape, "quota_used", tenant="shop", policy="day-money", unit="yuan") == used
    assert sum_samples(scrape, "tenant_spent_yuan", tenant="shop", window="day") == used
    assert sum_samples(scrape, "spent_yuan_total", tenant="shop", kind="face-enhance") == used
    assert sum_samples(scrape, "account_spent_yuan_total", account="main") == used
    assert sum_samples(scrape, "account_remaining_yuan", account="main") == 300 - 2 * used


async def test_spending_is_shown_as_the_usage_has_it(gateway: RunningGateway) -> None:
    """Uses and yuan by kind, of today, of this month and in total, less refunds; a tenant without has no series."""
    await gateway.upstream.set_balance(2, 300)
    days, tasks = [], []
    for window, kinds in (
        *(("month", ("vectorize",)), ("month", ("vectorize", "upscale"))),
        ("day", ("upscale", "vectorize", "upscale")),
    ):
        days.append(await advance_to_next_window(gateway, window))
        for kind in kinds:
            await gateway.advance(0.001)
            tasks.append(await run_task(gateway, kind))
    assert (await post_refund(gateway, task=tasks[3]["id"], reason="r")).status_code == 201
    scrape = await scrape_metrics(gateway)
    for window, start in (("day", days[2]), ("month", days[1]), ("total", days[0])):
        usage = await read_usage(gateway, f"from={start}&interval=total")
        assert {item["kind"] for item in usage["items"]} >= {"upscale"}
        for item in usage["items"]:
            labels = {"tenant": "shop", "kind": item["kind"], "window": window}
            shown = [sum_samples(scrape, f"tenant_spent_{unit}", **labels) for unit in ("uses", "yuan")]
            assert shown == [item["charged"]["count"], item["charged"]["money"]], labels
    assert sum_samples(scrape, "tenant_spent_uses", tenant="shop", window="total") == 2
    yuan = [sum_samples(scrape, "tenant_spent_yuan", tenant="shop", window=window) for window in ("day", "month")]
    assert yuan == [5, 8]
    await gateway.put_tenant("idle")
    assert sum_samples(await scrape_metrics(gateway), "tenant_spent_yuan", tenant="idle") is None


async def test_spending_of_unnamed_tenants_is_added_up(valkey: Valkey) -> None:
    async with run_real_gateway(valkey, GATEWAY_METRICS_TENANTS="1") as gateway:
        await gateway.upstream.set_balance(10, 300)
        await advance_to_next_window(gateway, "month")
        for name in ("press", "web"):
            await gateway.put_tenant(name)
            await run_task(gateway, token=await gateway.new_token(name))
        for shown in ([2, 2, 2], [0, 2, 2], [0, 0, 2]):
            scrape = await scrape_metrics(gateway)
            windows = ("day", "month", "total")
            assert shown == [sum_samples(scrape, "tenant_spent_uses", tenant="other", window=name) for name in windows]
            await advance_to_next_window(gateway, "day" if shown == [2, 2, 2] else "month")


async def test_unresponsive_store_does_not_delay_scrapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_snapshot, "SNAPSHOT_TIMEOUT_SECONDS", 0.2)
    with run_valkey() as store:
        async with run_real_gateway(store) as gateway:
            store.suspend()
            scrape = await scrape_metrics(gateway)
            assert sum_samples(scrape, "redis_up") == 0
            assert sum_samples(scrape, "redis_calls_total", command="read", outcome="abandoned") == 1
            store.resume()
            monkeypatch.undo()
            assert sum_samples(await scrape_metrics(gateway), "redis_up") == 1


@pytest.fixture
def collector() -> Iterator[TraceCollector]:
    with run_collector() as trace_collector:
        yield trace_collector


async def test_trace_from_submission_to_webhook(valkey: Valkey, collector: TraceCollector) -> None:
    traced = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "tool=of-the-caller"}
    async with (
        run_receiver() as receiver,
        run_real_gateway(valkey, GATEWAY_TRACES_URL=collector.url, GATEWAY_TRACES_SHARE="0") as gateway,
    ):
        await gateway.put_tenant(webhook={"url": receiver.url, "secret": make_secret(), "allow": [receiver.network]})
        for headers in (traced, {}):
            task = await gateway.wait_for_task((await gateway.submit(headers=headers)).json()["id"])
            await gateway.deliver_due_webhooks()
            result = await gateway.call("GET", task["artifacts"][0]["href"], headers=headers)
            assert result.status_code == 200
    request = collector.get_span("POST /v1/tasks/face-enhance")  # only one is: the other submission is not sampled
    assert (request.trace_id, request.parent_id, request.trace_state) == (TRACE, SPAN, "tool=of-the-caller")
    assert request.attributes["gateway.tenant"] == "shop"
    parts = [span for span in collector.spans if span.parent_id == request.span_id]
    assert [span.name for span in parts] == ["EVALSHA reserve", "POST /api/submit_face_enhance_task", "EVALSHA settle"]
    assert {span.trace_id for span in parts} == {TRACE}
    checks = collector.find_spans("check task")
    assert checks
    for check in checks:
        assert check.links == [(TRACE, request.span_id)]
        inner = [span.name for span in collector.spans if span.trace_id == check.trace_id and span != check]
        assert inner == ["POST /api/check_task_status", "EVALSHA record_check"]
    delivery = collector.get_span("deliver webhook")
    assert delivery.links == [(TRACE, request.span_id)]
    (call,) = [span for span in collector.spans if span.parent_id == delivery.span_id]
    sampled, unsampled = receiver.requests
    assert sampled.headers["traceparent"].startswith(call.traceparent)
    assert "traceparent" not in unsampled.headers
    fetched = collector.get_span("GET /v1/tasks/{task_id}/artifacts/{name}")
    assert "GET" in [span.name for span in collector.spans if span.parent_id == fetched.span_id]
    assert [span for span in collector.spans if span.is_error] == []


async def test_idle_gateway_sends_no_spans(valkey: Valkey, collector: TraceCollector) -> None:
    async with run_real_gateway(valkey, GATEWAY_TRACES_URL=collector.url) as gateway:
        await gateway.services.task_poller.start_due()
        await gateway.services.webhook_dispatcher.start_due()
        await gateway.services.balance_refresher.refresh_due()
    assert {span.name.split()[1][:9] for span in collector.spans if not span.parent_id} == {"/admin/v1"}
