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
            "How much is asked of the gateway, by tenants and by operators (probes and scrapes are among the latter)."
            " Worry when the tenants' line falls to nothing while they say that they work.",
            PER_SECOND,
            {"{{port}}": rate(_REQUESTS, "port")},
            width=THIRD,
        ),
        graph(
            "Answers by status",
            "What tenants are answered. 402 and 429 are limits at work, 499 is a client that left. Worry about any"
            " lasting 5xx: 502 and 504 come from the vendor, 503 from Redis or the vendor, 500 is a fault of ours.",
            PER_SECOND,
            {"{{status}}": rate(_REQUESTS, "status", where=('port="tenants"',))},
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Faults by route",
            "Answers of 500 and above a minute, on either port. Zero is right; one route alone points at its own"
            " collaborator, all of them at Redis or the process.",
            PER_MINUTE,
            {"{{route}} {{status}}": per_minute(_REQUESTS, "route", "status", where=('status=~"5.."',))},
            width=THIRD,
        ),
        graph(
            "Duration",
            "How long requests of tenants take that are not held open on purpose. Most of the highest line is the"
            " vendor taking submissions: look at the next panel before worrying about the gateway.",
            SECONDS,
            {f"{percent}%": quantile(percent / 100, _DURATION, where=('port="tenants"',)) for percent in (50, 95, 99)},
            width=THIRD,
            empty=_NO_REQUESTS,
        ),
        graph(
            "Duration by route, 95%",
            "How long requests of tenants take on each route. Reads come from memory or Redis and stay below a quarter"
            " of a second; submissions wait for the vendor. Worry when reads are slow: Redis or the event loop is.",
            SECONDS,
            {"{{method}} {{route}}": quantile(0.95, _DURATION, "method", "route", where=('port="tenants"',))},
            width=THIRD,
            empty=_NO_REQUESTS,
        ),
        graph(
            "Held open, 95%",
            "How long streams, downloads and waits for the end of a task are held. They are long on purpose; worry when"
            " they all end early, which is what a proxy does that cuts them off.",
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
            "Requests under way at once, in all processes. Worry when it climbs while the rate of requests does not:"
            " something behind the gateway got slow.",
            COUNT,
            {"{{port}}": sum_by("gateway_http_requests_in_progress", "port")},
            width=THIRD,
        ),
        graph(
            "Waiting clients",
            "Clients that wait for a task or follow one. Each costs an open connection and little else; worry when it"
            " grows without end, since then tasks do not end.",
            COUNT,
            {"waiting": sum_by("gateway_waiting_clients")},
            width=THIRD,
        ),
        graph(
            "Uploads in memory",
            "Bytes of images held until the vendor has them, in all processes, and what they may hold together. At the"
            " limit uploads wait, and get 503 if that lasts: add processes, or see why the vendor is slow.",
            BYTES,
            {
                "held": sum_by("gateway_upload_bytes"),
                "limit": sum_by("gateway_upload_limit_bytes"),
            },
            width=THIRD,
        ),
        graph(
            "Connections to the vendor in use",
            "Busy connections as a share of their limit, by operation. At 100% calls wait for their turn; if it lasts,"
            " the vendor got slow or the limit is too low.",
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
            "Checks under way as a share of how many may be at once. At 100% checks begin late, and so do webhooks and"
            " answers to those who wait.",
            RATIO,
            {"checks": (f"{sum_by('gateway_poll_checks_in_progress')} / ({sum_by('gateway_poll_checks_limit')} > 0)")},
            width=THIRD,
            steps=rising_thresholds(0.7, 0.9),
            maximum=1,
        ),
        graph(
            "Event loop lag, 99%",
            "How late each process gets to what it wanted to do. Above 100 ms everything in it is late: it has too"
            " little CPU, or something blocks it.",
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
            "Processes that are seen, by what they run. Two versions at once is a rollout; worry when it does not end,"
            " or when there are fewer than were started.",
            COUNT,
            {"{{version}} on Python {{python}}": f"count by (version, python) ({series('gateway_build_info')})"},
            width=QUARTER,
        ),
        graph(
            "Memory",
            "Resident memory of each process. It follows the uploads it holds; worry when it only ever grows.",
            BYTES,
            {"{{instance}}": only_gateways(series("process_resident_memory_bytes"))},
            width=QUARTER,
        ),
        graph(
            "CPU",
            "Cores used by each process. One process uses one core at most: near 1 it is the bottleneck, so add more.",
            COUNT,
            {"{{instance}}": only_gateways(f"rate({series('process_cpu_seconds_total')}[{RATE}])")},
            width=QUARTER,
            steps=rising_thresholds(0.7, 0.9),
        ),
        graph(
            "Open files",
            "Files and connections of each process as a share of what it may open. At 100% it can accept no more.",
            RATIO,
            {"{{instance}}": only_gateways(f"{series('process_open_fds')} / {series('process_max_fds')}")},
            width=QUARTER,
            steps=rising_thresholds(0.7, 0.9),
            maximum=1,
        ),
    ),
)

_REDIS_ROW = Row(
    "Ledger (Redis)",
    (
        figure(
            "Ledger readable",
            "1 if every process could read the ledger when last scraped. At 0 submissions are refused with 503, while"
            " reads go on; what dashboards show of quota, balances and queues is missing meanwhile.",
            COUNT,
            {"readable": f"min({series('gateway_redis_up')})"},
            steps=((None, "red"), (1, "green")),
        ).height(8),
        graph(
            "Calls",
            "Calls of the ledger by what they are for: reserve and settle for each submission, claim and record for"
            " each check, read for the rest. They follow the load; a call that alone runs away is a loop.",
            PER_SECOND,
            {"{{command}}": rate("gateway_redis_calls_total", "command")},
            width=20,
        ),
        graph(
            "Failed calls",
            "Calls a minute that did not succeed: `unavailable` is Redis being away or too slow, `fault` is a script"
            " that failed, which is a fault of ours. Zero is right, but for a moment during a failover.",
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
            "How long calls of the ledger take. A script takes a few milliseconds; worry above 50, where submissions"
            " and reads become slow with it.",
            SECONDS,
            {"{{command}}": quantile(0.99, "gateway_redis_call_duration_seconds", "command")},
            width=QUARTER,
            steps=rising_thresholds(0.05, 0.25),
            empty="No calls",
        ),
        graph(
            "Clock offset",
            "How far the ledger's time is ahead of the clock of Redis. Zero is right; more means that this clock has"
            " stepped back. It shrinks by a tenth of the time that passes, and work goes on meanwhile.",
            SECONDS,
            {"offset": f"max({series('gateway_ledger_clock_offset_seconds')})"},
            width=QUARTER,
            steps=rising_thresholds(1, 60),
        ),
        graph(
            "Redis errors",
            "Errors a minute on the way to Redis or from it, by what was wrong. A few are a failover; `readonly` that"
            " stays is a replica taken for the primary.",
            PER_MINUTE,
            {"{{error}}": per_minute("gateway_redis_errors_total", "error")},
            width=QUARTER,
        ),
    ),
)

SERVICE = Dashboard(
    "service",
    "service",
    "Start here: whether the gateway keeps what it promises, and if not, whether it is asked too much, has too little"
    " room, or misses something it depends on.",
    (
        Row("Objectives", tuple(panel for each in OBJECTIVES for panel in each.panels())),
        _REQUESTS_ROW,
        _SATURATION_ROW,
        _PROCESSES_ROW,
        _REDIS_ROW,
    ),
)
