"""The dashboard of the service: objectives, requests and saturation."""

from __future__ import annotations

from deploy.grafana.layout import Dashboard, Row
from deploy.grafana.objectives import OBJECTIVES
from deploy.grafana.panels import (
    BYTES,
    COUNT,
    PER_MINUTE,
    PER_SECOND,
    QUARTER,
    RATIO,
    SECONDS,
    THIRD,
    figure,
    graph,
    rising_thresholds,
)
from deploy.grafana.queries import (
    RATE,
    only_gateways,
    per_minute,
    quantile,
    rate,
    series,
    sum_by,
)

_REQUESTS = "gateway_http_requests_total"
_DURATION = "gateway_http_request_duration_seconds"
_NO_REQUESTS = "No requests"
_BUSY = 'state="busy"'


_REQUESTS_ROW = Row(
    "Requests",
    (
        graph(
            "Requests by port",
            "Requests per second by tenants and by operators (probes and scrapes included). Worry when the tenants'"
            " line drops to zero although they send requests.",
            PER_SECOND,
            {"{{port}}": rate(_REQUESTS, "port")},
            width=THIRD,
        ),
        graph(
            "Responses by status",
            "Responses to tenants. 402 and 429 are limits, 499 is a client that disconnected. Worry about any"
            " lasting 5xx: 502 and 504 come from the vendor, 503 from Redis or the vendor, 500 is a bug in the"
            " gateway.",
            PER_SECOND,
            {"{{status}}": rate(_REQUESTS, "status", where=('port="tenants"',))},
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Errors by route",
            "Responses of 500 and above a minute, on either port. Zero is normal; one route alone points at its own"
            " dependency, all of them at Redis or the process.",
            PER_MINUTE,
            {"{{route}} {{status}}": per_minute(_REQUESTS, "route", "status", where=('status=~"5.."',))},
            width=THIRD,
        ),
        graph(
            "Duration",
            "Duration of tenants' requests, except those held open on purpose. Most of the highest line is the"
            " vendor taking submissions: check the next panel before suspecting the gateway.",
            SECONDS,
            {f"{percent}%": quantile(percent / 100, _DURATION, where=('port="tenants"',)) for percent in (50, 95, 99)},
            width=THIRD,
            empty=_NO_REQUESTS,
        ),
        graph(
            "Duration by route, 95%",
            "Duration of tenants' requests by route. Reads come from memory or Redis and stay below a quarter of a"
            " second; submissions wait for the vendor. Slow reads point at Redis or the event loop.",
            SECONDS,
            {"{{method}} {{route}}": quantile(0.95, _DURATION, "method", "route", where=('port="tenants"',))},
            width=THIRD,
            empty=_NO_REQUESTS,
        ),
        graph(
            "Streams, 95%",
            "Duration of streams, downloads and waits for the end of a task. They are long on purpose; if all of"
            " them end early, a proxy cuts them off.",
            SECONDS,
            {"{{route}}": quantile(0.95, "gateway_http_stream_duration_seconds", "route")},
            width=THIRD,
            empty="No streams, downloads or waits",
        ),
    ),
)

_SATURATION_ROW = Row(
    "Saturation",
    (
        graph(
            "Requests in progress",
            "Concurrent requests in all processes. Worry when they increase while the rate of requests does not: a"
            " dependency has become slow.",
            COUNT,
            {"{{port}}": sum_by("gateway_http_requests_in_progress", "port")},
            width=THIRD,
        ),
        graph(
            "Waiting clients",
            "Clients that wait for a task or follow one. Each costs little more than an open connection; worry when"
            " the number keeps growing, since then tasks do not end.",
            COUNT,
            {"waiting": sum_by("gateway_waiting_clients")},
            width=THIRD,
        ),
        graph(
            "Uploads in memory",
            "Bytes of images held until the vendor has them, in all processes, and their limit. At the limit"
            " uploads wait, and get 503 if that lasts: add processes, or find out why the vendor is slow.",
            BYTES,
            {
                "held": sum_by("gateway_upload_bytes"),
                "limit": sum_by("gateway_upload_limit_bytes"),
            },
            width=THIRD,
        ),
        graph(
            "Connections to the vendor in use",
            "Busy connections as a share of their limit, by operation. At 100% calls wait; if that lasts, the"
            " vendor has become slow or the limit is too low.",
            RATIO,
            {
                "{{operation}}": (
                    f"{sum_by('gateway_upstream_connections', 'operation', where=(_BUSY,))}"
                    f" / on (operation) ({sum_by('gateway_upstream_connections_limit', 'operation')} > 0)"
                )
            },
            width=THIRD,
            steps=rising_thresholds(0.7, 0.9),
            maximum=1,
        ),
        graph(
            "Capacity of checks in use",
            "Concurrent checks as a share of their limit. At 100% checks start late, and so do webhooks and the"
            " responses to waiting clients.",
            RATIO,
            {"checks": (f"{sum_by('gateway_poll_checks_in_progress')} / ({sum_by('gateway_poll_checks_limit')} > 0)")},
            width=THIRD,
            steps=rising_thresholds(0.7, 0.9),
            maximum=1,
        ),
        graph(
            "Event loop lag, 99%",
            "Delay of scheduled work in each process. Above 100 ms everything in it is late: it has too little CPU,"
            " or something blocks it.",
            SECONDS,
            {"{{instance}}": quantile(0.99, "gateway_event_loop_lag_seconds", "instance")},
            width=THIRD,
            steps=rising_thresholds(0.1, 0.5),
        ),
    ),
)

_PROCESSES_ROW = Row(
    "Processes",
    (
        graph(
            "Processes by version",
            "Running processes by version. Two versions at once are a rollout; worry when it does not end, or when"
            " processes are missing.",
            COUNT,
            {"{{version}} on Python {{python}}": f"count by (version, python) ({series('gateway_build_info')})"},
            width=QUARTER,
        ),
        graph(
            "Memory",
            "Resident memory of each process. It follows the uploads that it holds; worry when it only ever grows.",
            BYTES,
            {"{{instance}}": only_gateways(series("process_resident_memory_bytes"))},
            width=QUARTER,
        ),
        graph(
            "CPU",
            "Cores used by each process. A process uses at most one core: near 1 it is the bottleneck, so add"
            " processes.",
            COUNT,
            {"{{instance}}": only_gateways(f"rate({series('process_cpu_seconds_total')}[{RATE}])")},
            width=QUARTER,
            steps=rising_thresholds(0.7, 0.9),
        ),
        graph(
            "Open files",
            "Open files and connections of each process as a share of its limit. At 100% it accepts no more.",
            RATIO,
            {"{{instance}}": only_gateways(f"{series('process_open_fds')} / {series('process_max_fds')}")},
            width=QUARTER,
            steps=rising_thresholds(0.7, 0.9),
            maximum=1,
        ),
    ),
)

_REDIS_ROW = Row(
    "Redis",
    (
        figure(
            "Redis readable",
            "1 if every process could read the ledger at the last scrape. At 0 submissions get 503 while reads"
            " continue; quota, balances and queues are missing from the dashboards meanwhile.",
            COUNT,
            {"readable": f"min({series('gateway_redis_up')})"},
            steps=((None, "red"), (1, "green")),
        ).height(8),
        graph(
            "Calls",
            "Redis calls by command: reserve and settle for each submission, claim and record for each check, read"
            " for the rest. They follow the load; a single command out of proportion is a loop.",
            PER_SECOND,
            {"{{command}}": rate("gateway_redis_calls_total", "command")},
            width=20,
        ),
        graph(
            "Failed calls",
            "Failed calls a minute: `unavailable` is an outage or a timeout, `fault` a failed script, which is a"
            " bug in the gateway. Zero is normal, except for a moment during a failover.",
            PER_MINUTE,
            {
                "{{outcome}} {{command}}": per_minute(
                    "gateway_redis_calls_total", "outcome", "command", where=('outcome!="ok"',)
                )
            },
            width=QUARTER,
        ),
        graph(
            "Duration of calls, 99%",
            "Duration of Redis calls. A script takes a few milliseconds; worry above 50, since submissions and"
            " reads become slow with it.",
            SECONDS,
            {"{{command}}": quantile(0.99, "gateway_redis_call_duration_seconds", "command")},
            width=QUARTER,
            steps=rising_thresholds(0.05, 0.25),
            empty="No calls",
        ),
        graph(
            "Clock offset",
            "How far the ledger's clock is ahead of the clock of Redis. Zero is normal; more means that the"
            " server's clock has stepped back. It shrinks by a tenth of the elapsed time while work continues.",
            SECONDS,
            {"offset": f"max({series('gateway_ledger_clock_offset_seconds')})"},
            width=QUARTER,
            steps=rising_thresholds(1, 60),
        ),
        graph(
            "Redis errors",
            "Errors a minute of connections and responses, by type. A few are a failover; a lasting `readonly` is a"
            " replica used as primary.",
            PER_MINUTE,
            {"{{error}}": per_minute("gateway_redis_errors_total", "error")},
            width=QUARTER,
        ),
    ),
)

SERVICE = Dashboard(
    "service",
    "service",
    "Start here: objectives, load, saturation and dependencies of the gateway.",
    (
        Row("Objectives", tuple(panel for objective in OBJECTIVES for panel in objective.panels())),
        _REQUESTS_ROW,
        _SATURATION_ROW,
        _PROCESSES_ROW,
        _REDIS_ROW,
    ),
)
