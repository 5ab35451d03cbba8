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
            "Requests per second of tenants and of operators (including probes and scrapes). Worry when the tenants'"
            " line falls to zero while tenants send requests.",
            PER_SECOND,
            {"{{port}}": rate(_REQUESTS, "port")},
            width=QUARTER,
        ),
        graph(
            "Responses by status",
            "Responses to tenants. 402 and 429 are limits, 499 is a client that disconnected. Worry about any lasting"
            " 5xx: 502 and 504 come from the vendor, 503 from Redis or the vendor, 500 is a bug of the gateway.",
            PER_SECOND,
            {"{{status}}": rate(_REQUESTS, "status", where=('port="tenants"',))},
            width=QUARTER,
            stacked=True,
        ),
        graph(
            "Faults by route",
            "Responses of 500 and above per minute, on both ports. Zero is normal; a single route points to its own"
            " dependency, all routes to Redis or the process.",
            PER_MINUTE,
            {"{{route}} {{status}}": per_minute(_REQUESTS, "route", "status", where=('status=~"5.."',))},
            width=QUARTER,
        ),
        graph(
            "Requests without a valid token",
            "Requests per minute whose token is missing, wrong, expired or revoked. A few are programs with an old"
            " token; worry when it stays high, since tokens may be guessed. The log names the clients.",
            PER_MINUTE,
            {"{{port}}": per_minute("gateway_authentication_failures_total", "port")},
            width=QUARTER,
        ),
        graph(
            "Duration",
            "Duration of tenants' requests other than streams and waits. Most of the highest line is the upload to the"
            " vendor: compare the next panel first.",
            SECONDS,
            {f"{percent}%": quantile(percent / 100, _DURATION, where=('port="tenants"',)) for percent in (50, 95, 99)},
            width=THIRD,
            empty=_NO_REQUESTS,
        ),
        graph(
            "Duration by route, 95%",
            "Duration of tenants' requests by route. Reads come from memory or Redis and stay below a quarter of a"
            " second; submissions wait for the vendor. Worry when reads are slow: Redis or the event loop is the"
            " cause.",
            SECONDS,
            {"{{method}} {{route}}": quantile(0.95, _DURATION, "method", "route", where=('port="tenants"',))},
            width=THIRD,
            empty=_NO_REQUESTS,
        ),
        graph(
            "Long-lived requests, 95%",
            "Duration of streams, downloads and waits for the end of a task. They are long on purpose; worry when all"
            " end early, as with a proxy that cuts them off.",
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
            "Concurrent requests in all processes. Worry when it rises while the rate of requests does not: a"
            " dependency has become slow.",
            COUNT,
            {"{{port}}": sum_by("gateway_http_requests_in_progress", "port")},
            width=THIRD,
        ),
        graph(
            "Waiting clients",
            "Clients that wait for a task or stream it. Each costs an open connection and little else; worry when it"
            " keeps growing, since then tasks do not end.",
            COUNT,
            {"waiting": sum_by("gateway_waiting_clients")},
            width=THIRD,
        ),
        graph(
            "Uploads in memory",
            "Bytes of images in memory until the vendor has them, in all processes, and the limit. At the limit"
            " uploads wait, and finally get 503: add processes, or find out why the vendor is slow.",
            BYTES,
            {
                "held": sum_by("gateway_upload_bytes"),
                "limit": sum_by("gateway_upload_limit_bytes"),
            },
            width=THIRD,
        ),
        graph(
            "Connections to the vendor in use",
            "Busy connections as a share of their limit, by operation. At 100% requests wait; if it lasts, the vendor"
            " has become slow or the limit is too low.",
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
            "Checks of tasks in use",
            "Concurrent checks as a share of their limit. At 100% checks begin late, and so do webhooks and responses"
            " to waiting clients.",
            RATIO,
            {"checks": (f"{sum_by('gateway_poll_checks_in_progress')} / ({sum_by('gateway_poll_checks_limit')} > 0)")},
            width=THIRD,
            steps=rising_thresholds(0.7, 0.9),
            maximum=1,
        ),
        graph(
            "Event loop lag, 99%",
            "How late each process runs its work. Above 100 ms everything in it is late: it has too little CPU, or a"
            " call blocks it.",
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
            "Scraped processes by version. Two versions are a rollout; worry when it does not end, or when there are"
            " fewer processes than were started.",
            COUNT,
            {"{{version}} on Python {{python}}": f"count by (version, python) ({series('gateway_build_info')})"},
            width=QUARTER,
        ),
        graph(
            "Memory",
            "Resident memory of each process. It follows the uploads in memory; worry when it only grows.",
            BYTES,
            {"{{instance}}": only_gateways(series("process_resident_memory_bytes"))},
            width=QUARTER,
        ),
        graph(
            "CPU",
            "Cores used by each process. One process uses at most one core: near 1 it is the bottleneck, so add more.",
            COUNT,
            {"{{instance}}": only_gateways(f"rate({series('process_cpu_seconds_total')}[{RATE}])")},
            width=QUARTER,
            steps=rising_thresholds(0.7, 0.9),
        ),
        graph(
            "Open files",
            "Open files and connections of each process as a share of its limit. At 100% it can't accept more.",
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
            "1 if every process could read Redis at its last scrape. At 0 submissions get 503, while reads work;"
            " quota, balances and queues are missing on the dashboards meanwhile.",
            COUNT,
            {"readable": f"min({series('gateway_redis_up')})"},
            steps=((None, "red"), (1, "green")),
        ).height(8),
        graph(
            "Calls",
            "Calls of Redis by command: reserve and settle for each submission, claim_checks and record_check for each"
            " check, read for the rest. They follow the load; a single one that grows alone is a loop.",
            PER_SECOND,
            {"{{command}}": rate("gateway_redis_calls_total", "command")},
            width=20,
        ),
        graph(
            "Failed calls",
            "Failed calls per minute: `unavailable` means that Redis is down or too slow, `fault` that a script"
            " failed, which is a bug of the gateway. Zero is normal, except for a moment during a failover.",
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
            "Duration of calls of Redis. A script takes a few milliseconds; worry above 50, which slows submissions"
            " and reads.",
            SECONDS,
            {"{{command}}": quantile(0.99, "gateway_redis_call_duration_seconds", "command")},
            width=QUARTER,
            steps=rising_thresholds(0.05, 0.25),
            empty="No calls",
        ),
        graph(
            "Clock offset",
            "How far the ledger's time is ahead of the clock of Redis. Zero is normal; more means that this clock has"
            " stepped back. It shrinks by a tenth of the time that passes; work continues meanwhile.",
            SECONDS,
            {"offset": f"max({series('gateway_ledger_clock_offset_seconds')})"},
            width=QUARTER,
            steps=rising_thresholds(1, 60),
        ),
        graph(
            "Redis errors",
            "Errors per minute of Redis or its connections, by kind. A few are a failover; a lasting `readonly` is a"
            " replica in place of the primary.",
            PER_MINUTE,
            {"{{error}}": per_minute("gateway_redis_errors_total", "error")},
            width=QUARTER,
        ),
    ),
)

SERVICE = Dashboard(
    "service",
    "service",
    "Service level objectives, load, saturation, processes, and Redis.",
    (
        Row("Objectives", tuple(panel for each in OBJECTIVES for panel in each.panels())),
        _REQUESTS_ROW,
        _SATURATION_ROW,
        _PROCESSES_ROW,
        _REDIS_ROW,
    ),
)
