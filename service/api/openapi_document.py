"""The OpenAPI documents, with examples and webhooks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Litestar
from litestar.openapi.config import OpenAPIConfig
from msgspec import Struct
from msgspec.structs import replace

from service.api import admin_schemas, health, legacy, openapi, schemas
from service.api.admin_schemas import Delivery, DeliveryList, NewSecret, TaskEvent, Webhook
from service.api.errors import MEDIA_TYPE, PROBLEMS, ProblemResponse, render
from service.api.schemas import (
    Artifact,
    Availability,
    Cost,
    Links,
    Policy,
    Quota,
    Submission,
    Task,
    TaskList,
    render_csv,
    render_usage,
    tabulate_usage,
)
from service.api.tasks import encode_event
from service.domain.ledger import Measure, Refund, ReservationState, Tally
from service.domain.tasks import OPTIONS, ArtifactName, CostBasis, Kind, State, UpscaleOptions
from service.domain.tenants import Window
from service.domain.webhooks import DeliveryState, WebhookEvent
from service.usecases.reports import (
    BalanceSuggestion,
    FlaggedSubmission,
    Group,
    Interval,
    TenantRef,
    UsageReport,
    UsageRow,
)

_TASK_ID = "task_Zm9yIHRoZSBkb2N1bWVudCBvbmx5"
_CREATED_AT = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
_FINISHED_AT = datetime(2026, 1, 31, 12, 0, 21, tzinfo=UTC)
_TASK_EXAMPLE = Task(
    id=_TASK_ID,
    kind=Kind.UPSCALE,
    state=State.SUCCEEDED,
    created_at=_CREATED_AT,
    updated_at=_FINISHED_AT,
    finished_at=_FINISHED_AT,
    options=msgspec.to_builtins(UpscaleOptions(scale=4)),
    metadata={"order": "4711"},
    artifacts=[
        Artifact(ArtifactName.IMAGE, "https://upstream.example/files/1.png", f"/v1/tasks/{_TASK_ID}/artifacts/image")
    ],
    error=None,
    cost=Cost(count=1, money=0, basis=CostBasis.OBSERVED),
    links=Links(self=f"/v1/tasks/{_TASK_ID}", events=f"/v1/tasks/{_TASK_ID}/events"),
)
_QUOTA_EXAMPLE = Quota(
    policies=[
        Policy(
            policy="day-tasks",
            unit="tasks",
            window=Window.DAY,
            limit=100,
            used=58,
            reserved=1,
            remaining=41,
            overrun=None,
            resets_at=datetime(2026, 2, 1, tzinfo=UTC),
        ),
        Policy(
            policy="max-active",
            unit="active",
            window=None,
            limit=20,
            used=1,
            reserved=0,
            remaining=19,
            overrun=None,
            resets_at=None,
        ),
    ],
    account=Availability(can_pay=True, look_again_at=None),
)
_SUBMISSION_ID = "f3a1c09b6d5e4f708192a3b4c5d6e7f8"
_OWNER = TenantRef(1_769_860_800_000, "shop")
_DAY = date(2026, 1, 31)
_TALLY = Tally(
    {
        Measure.SUCCEEDED: 57,
        Measure.UNKNOWN: 1,
        Measure.OBSERVED_COUNT: 55,
        Measure.ESTIMATED_MONEY: 100,
        Measure.REFUNDED: 1,
        Measure.REFUNDED_COUNT: 1,
    }
)
_REFUND = Refund(int(_FINISHED_AT.timestamp()) * 1000, "The result was blank.", count=1, money_fen=0)


def _example_report(*groups: Group) -> UsageReport:
    return UsageReport(
        _DAY.replace(day=1),
        _DAY,
        Interval.DAY,
        groups,
        rows=[UsageRow(str(_DAY), _OWNER if Group.TENANT in groups else None, Kind.UPSCALE, _TALLY)],
        total=_TALLY,
        unknown=[FlaggedSubmission(_SUBMISSION_ID, _OWNER, Kind.UPSCALE, _DAY)],
        refunds=[(FlaggedSubmission("0c7d9f2b4a6e81c35f7092b4d6e8a1c3", _OWNER, Kind.UPSCALE, _DAY), _REFUND)],
    )


_SUBMISSION_EXAMPLE = Submission(
    id=_SUBMISSION_ID,
    outcome=ReservationState.UNKNOWN,
    kind=Kind.UPSCALE,
    created_at=_CREATED_AT,
    settled_at=_FINISHED_AT,
    task=None,
    cost=Cost(count=0, money=1.2, basis=CostBasis.UNKNOWN),
    balance_suggests=BalanceSuggestion.NOT_CHARGED,
    refund=None,
)
_DELIVERY_EXAMPLE = Delivery(
    id=f"msg_{_SUBMISSION_ID}",
    tenant="shop",
    task=_TASK_ID,
    url="https://hooks.example/ended",
    state=DeliveryState.FAILED,
    attempts=11,
    status=500,
    error="It responded 500.",
    answer="no space left",
    created_at=_FINISHED_AT,
    updated_at=datetime(2026, 2, 1, 11, 2, tzinfo=UTC),
    due_at=None,
)
EXAMPLES: Mapping[str, Struct] = {
    type(example).__name__: example
    for example in (
        _TASK_EXAMPLE,
        TaskList([_TASK_EXAMPLE], next_cursor=None),
        _QUOTA_EXAMPLE,
        _SUBMISSION_EXAMPLE,
        Webhook("https://hooks.example/ended", ["hooks.example", "10.20.0.0/16"], []),
        NewSecret("whsec_Zm9yIHRoZSBkb2N1bWVudCBvbmx5LCBub3QgYSBrZXk=", _FINISHED_AT),
        _DELIVERY_EXAMPLE,
        DeliveryList([_DELIVERY_EXAMPLE]),
        render_usage(_example_report(Group.KIND), for_operators=False),
    )
}
"""Examples of responses by the name of their type."""
CSV_EXAMPLES: Mapping[str, str] = {
    "read-usage": render_csv(*tabulate_usage(_example_report(Group.KIND), for_operators=False)).decode(),
    "read-all-usage": render_csv(
        *tabulate_usage(_example_report(Group.TENANT, Group.KIND), for_operators=True)
    ).decode(),
}
STREAM_EXAMPLES: Mapping[str, str] = {"follow-task": encode_event(_TASK_EXAMPLE, 3).decode()}
SUBMIT_EXAMPLES: Mapping[str, Struct] = {
    f"submit-{kind}": replace(
        _TASK_EXAMPLE,
        kind=kind,
        state=State.QUEUED,
        updated_at=_CREATED_AT,
        finished_at=None,
        options=msgspec.to_builtins(OPTIONS[kind]()),
        artifacts=[],
        cost=Cost(count=0, money=0, basis=CostBasis.UNKNOWN),
    )
    for kind in Kind
}
"""Examples of other media types and of submissions, by operation id."""
_PROBLEM_EXTRAS: Mapping[str, Mapping[str, Any]] = {
    "invalid-options": {"errors": [{"field": "scale", "detail": "must be a number from 1 to 8"}]},
    "quota-exceeded": {
        "violated_policies": [{"policy": "day-tasks", "limit": 100, "resets_at": "2026-02-01T00:00:00Z"}]
    },
    "rate-limited": {
        "violated_policies": [{"policy": "minute-tasks", "limit": 10, "resets_at": "2026-01-31T12:01:00Z"}]
    },
    "too-many-active-tasks": {"violated_policies": [{"policy": "max-active", "limit": 20, "resets_at": None}]},
    "upstream-rejected": {"upstream_reason": "图片太小"},
    "submission-unknown": {"submission_id": _SUBMISSION_ID},
}


def example_problem(code: str) -> Any:
    kind = next(problem for problem in PROBLEMS if problem.code == code)
    problem = ProblemResponse(kind, kind.description, _PROBLEM_EXTRAS.get(code, {}))
    return msgspec.json.decode(render(problem, request_id="4f5c2d1e8b7a46f09d3c6b5a49382716")[2])


WEBHOOKS_TAG = "Webhooks"
"""A tag of their own, since client generators write one file for each tag."""
_WEBHOOK_NAME = "task-ended"
_WEBHOOK_DESCRIPTION = (
    "Sent to your webhook address, or to the task's `webhook_url`, when the task has ended, with signatures according "
    "to [Standard Webhooks](https://www.standardwebhooks.com/) 1.0.0: verify them with one of its libraries, your "
    "`whsec_` secret and the exact bytes of the body. Respond with a status from 200 to 299 within 15 seconds. Other "
    "responses are retried with backoff for a day, except 410, which disables the address. Delivery is at least once: "
    "repetitions have the same `webhook-id`."
)
_WEBHOOK_HEADERS = {
    "webhook-id": "The id of the event, the same for all attempts.",
    "webhook-timestamp": "Time of the attempt, in seconds since the epoch.",
    "webhook-signature": "A signature, or two separated by a space during a change of your secret.",
}


def add_webhooks(document: dict[str, Any]) -> None:
    """Add the webhooks and their components to a document."""
    components = document["components"]
    components["schemas"][TaskEvent.__name__] = _event_schema()
    # By reference: client generators would mistake an inline operation for one of the gateway.
    components["pathItems"] = {_WEBHOOK_NAME: {"post": _webhook_operation()}}
    document["webhooks"] = {_WEBHOOK_NAME: {"$ref": f"#/components/pathItems/{_WEBHOOK_NAME}"}}


def _event_schema() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "Event that a task has ended.",
        "properties": {
            "type": {"type": "string", "enum": [event.value for event in WebhookEvent]},
            "timestamp": {"type": "string", "format": "date-time", "description": "When the task ended."},
            "data": {"$ref": "#/components/schemas/Task"},
        },
        "required": ["type", "timestamp", "data"],
    }


def _webhook_operation() -> dict[str, Any]:
    task = msgspec.convert(EXAMPLES["Task"], Task)
    example = TaskEvent(WebhookEvent.SUCCEEDED, task.finished_at or task.updated_at, task)
    schema = {"$ref": f"#/components/schemas/{TaskEvent.__name__}"}
    return {
        "operationId": _WEBHOOK_NAME,
        "summary": "Your task has ended",
        "description": _WEBHOOK_DESCRIPTION,
        "tags": [WEBHOOKS_TAG],
        "security": [{}],
        "parameters": [
            {"name": name, "in": "header", "required": True, "description": text, "schema": {"type": "string"}}
            for name, text in _WEBHOOK_HEADERS.items()
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema, "example": msgspec.to_builtins(example)}},
        },
        "responses": {"2XX": {"description": "Received."}},
    }


Node = dict[str, Any]
_TEXT_SCHEMA = {"type": "string"}
_FILE_SCHEMA = _TEXT_SCHEMA | {"format": "binary"}


def _header(description: str, *, type: str = "string", **schema: Any) -> Node:  # noqa: A002 - the name in JSON schema
    return {"description": description, "schema": {"type": type} | schema}


_HEADER_COMPONENTS: Mapping[str, Node] = {
    "X-Request-Id": _header(
        "The id of the request: yours if it has this form, else a new one.", pattern="^[A-Za-z0-9._-]{1,128}$"
    ),
    "Location": _header("Path of the task.", format="uri-reference"),
    "Content-Disposition": _header("Name of the file."),
    "Content-Range": _header("Position of these bytes, and total size."),
    "ETag": _header("The version, for If-None-Match or If-Match."),
    "Last-Modified": _header("Time of the result, for If-Modified-Since."),
    "Accept-Ranges": _header("`bytes` if ranges can be requested."),
    "Age": _header("Seconds since the upstream reported this state.", type="integer", minimum=0),
    "Retry-After": _header(
        "Seconds after which to repeat the request. Absent if waiting does not help, and once a task has ended.",
        type="integer",
        minimum=0,
    ),
    "Cache-Control": _header("Whether and by whom it may be stored."),
    "RateLimit-Policy": _header(
        "Your limits on tasks, each with quota `q` and window `w` in seconds. Absent without limits.",
        examples=['"day-tasks";q=100;w=86400, "total-tasks";q=5000'],
    ),
    "RateLimit": _header(
        "The rest `r` of each limit, and seconds to its reset `t`. Absent without limits.",
        examples=['"day-tasks";r=41;t=22980, "total-tasks";r=812'],
    ),
    "Preference-Applied": _header("The longest wait that was applied."),
    "Idempotent-Replayed": _header(
        "`true` if this is about the first submission under the same `Idempotency-Key`.", const="true"
    ),
    "WWW-Authenticate": _header("The method of authentication: a bearer token."),
}
_HEADER_NAMES = {name.lower(): name for name in _HEADER_COMPONENTS}
_PROBLEM_HEADERS: Mapping[str, tuple[str, ...]] = {
    "401": ("WWW-Authenticate",),
    "402": ("Retry-After",),
    "409": ("Retry-After",),
    "416": ("Content-Range",),
    "429": ("Retry-After", "RateLimit-Policy", "RateLimit"),
    "503": ("Retry-After",),
    "504": ("Idempotent-Replayed",),
}
_NOT_MODIFIED_HEADERS = frozenset({"ETag", "Age", "Retry-After", "Last-Modified", "Accept-Ranges", "Cache-Control"})
"""Headers of a success that a 304 has too."""
_STRUCTS: Mapping[str, type[Struct]] = {
    name: value
    for module in (admin_schemas, health, legacy, openapi, schemas)
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, Struct) and value.__module__ == module.__name__
}
"""All objects of the API. Litestar omits their docstrings, and that some forbid unknown fields."""
_FILE_OPERATIONS = frozenset({"read-artifact"})
_FALSE_BY_DEFAULT = ("deprecated", "allowEmptyValue", "allowReserved")
_JSON_TYPES = frozenset({"object", "array", "string", "boolean", "number", "null"})
_KEY_ORDER = ("openapi", "info", "servers", "security", "tags", "paths", "webhooks", "components")


def build_document(app: Litestar) -> Node:
    """Build the OpenAPI document of an application."""
    document = _normalize(app.openapi_schema.to_schema())
    components = document["components"]
    objects = components["schemas"]
    for name, schema in objects.items():
        schema.pop("title", None)
        if struct := _STRUCTS.get(name):
            schema["description"] = inspect.getdoc(struct)
            if struct.__struct_config__.forbid_unknown_fields:
                schema["additionalProperties"] = False
        if name in EXAMPLES:
            schema["examples"] = [_to_json(EXAMPLES[name])]
    components["responses"] = {"Problem": _default_problem()}
    used = {"X-Request-Id"}
    for operation in _list_operations(document):
        operation["responses"] = dict(_complete_responses(operation["responses"]))
        used = used.union(*(response.get("headers", ()) for response in operation["responses"].values()))
        _add_examples(operation["operationId"], operation["responses"])
        for parameter in operation.get("parameters", ()):
            _normalize_parameter(parameter)
        _normalize_body(operation.get("requestBody", {}))
    if Task.__name__ in objects:
        add_webhooks(document)
    components["headers"] = {name: header for name, header in _HEADER_COMPONENTS.items() if name in used}
    components["schemas"] = dict(sorted(objects.items()))
    # A copy without shared parts, for which YAML would write anchors.
    return dict(_to_json({key: document[key] for key in _KEY_ORDER if key in document}))


def _add_examples(operation: str, responses: Node) -> None:
    if accepted := SUBMIT_EXAMPLES.get(operation):
        responses["201"]["content"]["application/json"]["examples"] = {"accepted": {"value": _to_json(accepted)}}
    if table := CSV_EXAMPLES.get(operation):
        responses["200"]["content"]["text/csv"] = {"schema": _TEXT_SCHEMA, "examples": {"usage": {"value": table}}}
    if stream := STREAM_EXAMPLES.get(operation):
        for media in responses["200"]["content"].values():
            media["examples"] = {"end": {"value": stream}}
    if operation in _FILE_OPERATIONS:
        for status in ("200", "206"):
            responses[status]["content"] = {media_type: {"schema": _FILE_SCHEMA} for media_type in openapi.FILE_TYPES}


def _list_operations(document: Node) -> Iterator[Node]:
    for item in document["paths"].values():
        yield from item.values()


def _complete_responses(responses: Node) -> Iterator[tuple[str, Node]]:
    """Yield the responses by status with their headers, without those that only Litestar assumes."""
    success_names = [_HEADER_NAMES[name.lower()] for name in responses.get("200", {}).get("headers", ())]
    for status, response in sorted(responses.items()):
        if _is_framework_error(response):
            continue
        names = [_HEADER_NAMES[name.lower()] for name in response.get("headers", ())]
        if status == "206":
            names += [*success_names, "Content-Range"]
        if status == "304":
            names += _NOT_MODIFIED_HEADERS.intersection(success_names)
        # The body of a problem contains the request's id.
        is_problem = MEDIA_TYPE in response.get("content", {})
        names += _PROBLEM_HEADERS.get(status, ()) if is_problem else ("X-Request-Id",)
        if response["description"] == HTTPStatus(int(status)).description:  # the default of Litestar
            response["description"] = HTTPStatus(int(status)).phrase
        for media in response.get("content", {}).values():
            media["schema"] = _without_null(media["schema"])
            if is_problem:
                # Litestar's own examples lack null values.
                media["examples"] = {code: {"value": example_problem(code)} for code in media["examples"]}
        yield status, response | ({"headers": _header_references(names)} if names else {})
    yield "default", {"$ref": "#/components/responses/Problem"}


def _to_json(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


def _is_framework_error(response: Node) -> bool:
    # The validation error of Litestar, which our exception handlers replace.
    media = response.get("content", {}).get("application/json", {})
    return "status_code" in media.get("schema", {}).get("properties", {})


def _default_problem() -> Node:
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        "description": "Any other problem: an unknown path (404) or method (405), or a fault of the gateway (500).",
        "headers": _header_references(["X-Request-Id"]),
        "content": {MEDIA_TYPE: {"schema": schema}},
    }


def _header_references(names: list[str]) -> Node:
    # In a fixed order, since Litestar's is random.
    return {name: {"$ref": f"#/components/headers/{name}"} for name in _HEADER_COMPONENTS if name in names}


def _normalize_parameter(parameter: Node) -> None:
    parameter["schema"].pop("description", None)
    parameter["schema"] = _without_null(parameter["schema"])


def _normalize_body(body: Node) -> None:
    # Litestar describes an optional body as one that may be null.
    for media in body.get("content", {}).values():
        schema = _without_null(media["schema"])
        body["required"] = schema == media["schema"]
        media["schema"] = schema


def _without_null(schema: Node) -> Node:
    """Return the schema of a value that is present: parameters and contents are never null."""
    options: list[Node] = [option for option in schema.get("oneOf", ()) if option != {"type": "null"}]
    if len(options) != 1:
        return schema
    return options[0] | {key: value for key, value in schema.items() if key != "oneOf"}


def _normalize(node: Any) -> Any:
    """Return a part of the document without defaults, in JSON types."""
    match node:
        case dict():
            kept = {
                key: _normalize(value)
                for key, value in node.items()
                if not (key in _FALSE_BY_DEFAULT and value is False) and not (key == "headers" and value == {})
            }
            return _normalize_schema(kept)
        case list():
            return [_normalize(item) for item in node]
        case Decimal() | float() if node == int(node):
            return int(node)
        case Decimal():
            return float(node)
        case _:
            return node


def _normalize_schema(node: Node) -> Node:
    """Correct and simplify a schema; other nodes are unchanged."""
    if {"type": "number"} in node.get("oneOf", ()):
        # An integer would match both, which `oneOf` forbids.
        node = node | {"oneOf": [option for option in node["oneOf"] if option != {"type": "integer"}]}
    if {option.get("type") for option in node.get("oneOf", ())} >= _JSON_TYPES:
        # Client generators write invalid code for a union of all types.
        node = {key: value for key, value in node.items() if key != "oneOf"}
    for choice in ("oneOf", "allOf"):
        if len(node.get(choice, ())) == 1:
            node = node[choice][0] | {key: value for key, value in node.items() if key != choice}
    if isinstance(pattern := node.get("pattern"), str):
        # ECMA-262 lacks the anchors of Python; its `$` is only the end of the text.
        node = node | {"pattern": pattern.replace(r"\A", "^").replace(r"\Z", "$")}
    properties = node.get("properties")
    if isinstance(properties, dict) and isinstance(node.get("required"), list):
        node["required"] = [name for name in properties if name in node["required"]]
    return node


def tenants_config() -> OpenAPIConfig:
    return openapi.openapi_config(
        title="Imaging Gateway",
        description="Upscale, vectorise, restore faces, make seamless: submit an image, follow its task, fetch the "
        "result. Send your token as `Authorization: Bearer TOKEN`. Errors are problem documents whose `detail` "
        "explains what to do.",
        bearer="Your token, beginning with `igw_`. The operators of the gateway make and revoke it.",
        tags={
            "Tasks": "Submit an image, and follow its task.",
            "Quota": "Your remaining quota.",
            "Usage": "Your spending, and the outcome of each submission.",
            WEBHOOKS_TAG: "Requests that the gateway sends to you when a task has ended.",
            "Old clients": "The upstream's own protocol, for programs that were written against it: change the base "
            "address, and the `user_key` to your token. Every response is HTTP 200.",
            "Service": "State of the process.",
        },
    )


def operators_config() -> OpenAPIConfig:
    return openapi.openapi_config(
        title="Imaging Gateway: operators",
        description="Accounts at the upstream, the tenants that spend them, and their tokens. `PUT` replaces: omitted "
        "fields get their defaults, only secrets are kept. Send the admin token as `Authorization: Bearer TOKEN`.",
        bearer="The admin token.",
        tags={
            "Registry": "Accounts, tenants and tokens.",
            "Tasks": "Tasks of all tenants.",
            "Usage": "Spending of tenants, the outcome of each submission, and refunds.",
            "Webhooks": "Secrets that sign webhooks, and failed deliveries.",
            "Service": "State of the process, and the time of the ledger.",
        },
    )
