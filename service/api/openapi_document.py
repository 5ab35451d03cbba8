"""The OpenAPI documents: Litestar's, corrected, with headers, problems, examples and webhooks."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Litestar
from litestar.openapi.config import OpenAPIConfig
from msgspec import UNSET, Struct
from msgspec.structs import fields

from service.api import admin_schemas, health, legacy, openapi, registry_schemas, schemas
from service.api.admin_schemas import TaskEvent, ThresholdEvent
from service.api.errors import MEDIA_TYPE, PROBLEMS, ProblemResponse, render
from service.api.openapi_tasks import describe_tasks
from service.api.schemas import Artifact, Availability, Cost, Links, Policy, Quota, QuotaThreshold, Task
from service.api.tasks import EVENT_STREAM_TYPE, encode_event
from service.domain.errors import UnreachableReason
from service.domain.media import EXTENSIONS
from service.domain.tasks import ArtifactName, CostBasis, Kind, State, UpscaleOptions
from service.domain.tenants import Window
from service.domain.webhooks import WebhookEvent

Node = dict[str, Any]
_TASK_ID = "task_Zm9yIHRoZSBkb2N1bWVudCBvbmx5"
_CREATED_AT = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
_FINISHED_AT = datetime(2026, 1, 31, 12, 0, 21, tzinfo=UTC)
_RESETS_AT = datetime(2026, 2, 1, tzinfo=UTC)
_TASK = Task(
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
_QUOTA = Quota(
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
            resets_at=_RESETS_AT,
        ),
    ],
    account=Availability(can_pay=True, look_again_at=None),
)
_EXAMPLES: Mapping[str, Struct] = {Quota.__name__: _QUOTA}
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
    "image-unreachable": {"reason": UnreachableReason.HTTP_STATUS},
    "submission-unknown": {"submission_id": "f3a1c09b6d5e4f708192a3b4c5d6e7f8"},
}

WEBHOOKS_TAG = "Webhooks"
"""A tag of their own, since client generators write one file for each tag."""
_WEBHOOK_RULES = (
    "The signatures are those of [Standard Webhooks](https://www.standardwebhooks.com/) 1.0.0: verify them with one of "
    "its libraries, your `whsec_` secret and the exact bytes of the body. Respond with a status from 200 to 299 within "
    "15 seconds. Other responses are retried with backoff for a day, except 410, which disables the address. Delivery "
    "is at least once: repetitions have the same `webhook-id`."
)
_WEBHOOK_HEADERS = {
    "webhook-id": "The id of the event, the same for all attempts.",
    "webhook-timestamp": "Time of the attempt, in seconds since the epoch.",
    "webhook-signature": "A signature, or two separated by a space during a change of your secret.",
}
_THRESHOLD = QuotaThreshold(
    tenant="shop",
    policy="month-money",
    unit="money",
    window=Window.MONTH,
    threshold=80,
    limit=500,
    used=401.5,
    reserved=3,
    remaining=95.5,
    resets_at=_RESETS_AT,
)


def _describe_event(event: TaskEvent | ThresholdEvent, types: Sequence[WebhookEvent], timestamp: str) -> Node:
    return {
        "type": "object",
        "description": inspect.getdoc(event),
        "properties": {
            "type": {"type": "string", "enum": list(types)},
            "timestamp": {"type": "string", "format": "date-time", "description": timestamp},
            "data": {"$ref": f"#/components/schemas/{type(event.data).__name__}"},
        },
        "required": ["type", "timestamp", "data"],
        "examples": [event],
    }


def _describe_webhook(name: str, summary: str, description: str, schema: str) -> Node:
    return {
        "operationId": name,
        "summary": summary,
        "description": f"{description} {_WEBHOOK_RULES}",
        "tags": [WEBHOOKS_TAG],
        "security": [{}],
        "parameters": [
            {"name": header, "in": "header", "required": True, "description": text, "schema": {"type": "string"}}
            for header, text in _WEBHOOK_HEADERS.items()
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
        },
        "responses": {"2XX": {"description": "Received."}},
    }


_EVENT_SCHEMAS = {
    TaskEvent.__name__: _describe_event(
        TaskEvent(WebhookEvent.SUCCEEDED, _FINISHED_AT, _TASK),
        (WebhookEvent.SUCCEEDED, WebhookEvent.FAILED),
        "When the task ended.",
    ),
    ThresholdEvent.__name__: _describe_event(
        ThresholdEvent(WebhookEvent.QUOTA_THRESHOLD, _FINISHED_AT, _THRESHOLD),
        (WebhookEvent.QUOTA_THRESHOLD,),
        "When that was noticed.",
    ),
}
_WEBHOOKS = {
    name: _describe_webhook(name, *texts)
    for name, *texts in (
        (
            "task-ended",
            "Your task has ended",
            "Sent to your webhook address, or to the task's `webhook_url`, when the task has ended.",
            TaskEvent.__name__,
        ),
        (
            "quota-threshold",
            "Much of a limit is used",
            (
                "Sent to your webhook address once for each threshold that the operators have set for a limit, in each "
                "window."
            ),
            ThresholdEvent.__name__,
        ),
    )
}


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
    "Link": _header('Path of the page about this problem, with `rel="help"`.'),
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
_TEXT = {"schema": {"type": "string"}}
_FILES = {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in EXTENSIONS}
_EVENTS = {EVENT_STREAM_TYPE: _TEXT | {"examples": {"end": {"value": encode_event(_TASK, 3).decode()}}}}
_USAGE = {"application/json": {"schema": {"$ref": "#/components/schemas/Usage"}}, "text/csv": _TEXT}
_CONTENTS: Mapping[str, Mapping[str, Node]] = {
    "read-artifact": {"200": _FILES, "206": _FILES},
    "follow-task": {"200": _EVENTS},
    "read-usage": {"200": _USAGE},
    "read-all-usage": {"200": _USAGE},
}
"""Contents, by operation and status, for which Litestar knows a single media type."""
_DEFAULT_PROBLEM: Node = {
    "description": "Any other problem: a request that can't be parsed (400, 431), an unknown path (404) or method "
    "(405), or a fault of the gateway (500).",
    "headers": {"X-Request-Id": {"$ref": "#/components/headers/X-Request-Id"}},
    "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
}
_STRUCTS: Mapping[str, type[Struct]] = {
    name: value
    for module in (admin_schemas, health, legacy, openapi, registry_schemas, schemas)
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, Struct) and value.__module__ == module.__name__
}
_CONSTRAINTS = frozenset(
    {
        *("minimum", "maximum", "minLength", "maxLength", "pattern", "format"),
        *("maxItems", "uniqueItems", "propertyNames"),
    }
)
_ENCODER = msgspec.json.Encoder(decimal_format="number")


def build_document(app: Litestar) -> Node:
    """Build the OpenAPI document of an application: Litestar's, corrected and completed."""
    document = app.openapi_schema.to_schema()
    components = document["components"]
    components |= {"headers": {}, "responses": {"Problem": _DEFAULT_PROBLEM}}
    for name, schema in components["schemas"].items():
        _complete_schema(name, schema)
    for item in document["paths"].values():
        for operation in item.values():
            _complete_operation(operation, components)
    describe_tasks(document, _TASK)
    if "AccountBody" in components["schemas"]:
        _describe_patches(document)
    if Task.__name__ in components["schemas"]:
        # By reference: client generators would mistake an inline operation for one of the gateway.
        document["webhooks"] = {name: {"$ref": f"#/components/pathItems/{name}"} for name in _WEBHOOKS}
        components["pathItems"] = {name: {"post": webhook} for name, webhook in _WEBHOOKS.items()}
        components["schemas"] |= _EVENT_SCHEMAS | {QuotaThreshold.__name__: _describe_threshold(components["schemas"])}
    # ECMA-262 lacks the anchors of Python; its `$` is only the end of the text.
    text = _ENCODER.encode(document).replace(rb"\\A", b"^").replace(rb"\\Z", b"$")
    # Decoded, so that no parts are shared: YAML would write anchors for them.
    return dict(msgspec.json.decode(text))


def _describe_threshold(schemas: Node) -> Node:
    """Return the schema of the data of an event, which no route returns."""
    _, components = msgspec.json.schema_components([QuotaThreshold], ref_template="#/components/schemas/{name}")
    schema: Node = components[QuotaThreshold.__name__]
    schema["properties"]["resets_at"] = schemas[Policy.__name__]["properties"]["resets_at"]
    return schema


def _complete_schema(name: str, schema: Node) -> None:
    if struct := _STRUCTS.get(name):
        # Litestar omits docstrings, and that some objects forbid unknown fields.
        schema["description"] = inspect.getdoc(struct)
        if struct.__struct_config__.forbid_unknown_fields:
            schema["additionalProperties"] = False
        elif not struct.__struct_config__.omit_defaults:
            # A response has all its fields, also those that are optional in the request.
            schema["required"] = [field.encode_name for field in fields(struct) if field.default is not UNSET]
        _add_constraints(schema, msgspec.json.schema_components([struct])[1][name])
    if properties := schema.get("properties"):
        schema["properties"] = {key: _unwrap(value, nullable=True) for key, value in properties.items()}
    if name in _EXAMPLES:
        schema["examples"] = [_EXAMPLES[name]]


def _add_constraints(schema: Node, exact: Node) -> None:
    """Add the constraints that Litestar omits: those of optional, listed and mapped values, and bounds of zero."""
    exact_options = {option.get("type"): option for option in exact.get("anyOf", [exact])}
    for option in schema.get("oneOf", [schema]):
        exact_option = exact_options.get(option.get("type"), {})
        option |= {word: value for word, value in exact_option.items() if word in _CONSTRAINTS}
        for word in ("items", "additionalProperties"):
            if isinstance(option.get(word), dict):
                _add_constraints(option[word], exact_option.get(word, {}))
        for name, value in option.get("properties", {}).items():
            _add_constraints(value, exact_option["properties"][name])
    if "oneOf" in schema:  # where Litestar writes some of those of its options
        for word in _CONSTRAINTS & schema.keys():
            del schema[word]


def _complete_operation(operation: Node, components: Node) -> None:
    for parameter in operation.get("parameters", ()):
        schema = _unwrap(parameter["schema"])
        if schema.get("enum") == list(ArtifactName):  # so that a generated client takes the `name` of an artifact
            schema = {"$ref": f"#/components/schemas/{ArtifactName.__name__}"}
        # Client generators ignore the default of a reference that has a description beside it.
        parameter["schema"] = {"$ref": schema["$ref"]} if "$ref" in schema else schema
    if body := operation.get("requestBody"):
        (media,) = body["content"].values()
        schema = _unwrap(media["schema"])
        # Litestar describes an optional body as one that may be null.
        body["required"] = schema == media["schema"]
        media["schema"] = schema
    responses = operation["responses"]
    # The validation error of Litestar, which the exception handlers replace.
    if MEDIA_TYPE not in responses.get("400", {}).get("content", [MEDIA_TYPE]):
        del responses["400"]
    for status, content in _CONTENTS.get(operation["operationId"], {}).items():
        responses[status]["content"] = content
    success = {_HEADER_NAMES[name.lower()] for name in responses.get("200", {}).get("headers", ())}
    operation["responses"] = {
        status: _problem_response(status, response, components)
        if MEDIA_TYPE in response.get("content", {})
        else _plain_response(status, response, success, components)
        for status, response in sorted(responses.items())
    } | {"default": {"$ref": "#/components/responses/Problem"}}


def _plain_response(status: str, response: Node, success_headers: set[str], components: Node) -> Node:
    names = {"X-Request-Id"} | {_HEADER_NAMES[name.lower()] for name in response.get("headers", ())}
    if status == "206":
        names |= success_headers | {"Content-Range"}
    if status == "304":
        names |= success_headers & _NOT_MODIFIED_HEADERS
    if response["description"] == HTTPStatus(int(status)).description:
        response["description"] = HTTPStatus(int(status)).phrase  # Litestar's default promises a document or a URL
    for media_type, media in response.get("content", {}).items():
        response["content"][media_type] = media | {"schema": _unwrap(media["schema"])}
    return response | {"headers": _refer_headers(names, components)}


def _problem_response(status: str, response: Node, components: Node) -> Node:
    codes = response["content"][MEDIA_TYPE]["examples"]
    name = "-or-".join(codes)
    components["responses"][name] = {
        "description": response["description"],
        "headers": _refer_headers({"X-Request-Id", "Link", *_PROBLEM_HEADERS.get(status, ())}, components),
        "content": {
            MEDIA_TYPE: {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "examples": {code: {"value": _example_problem(code)} for code in codes},
            }
        },
    }
    return {"$ref": f"#/components/responses/{name}"}


def _example_problem(code: str) -> Any:
    kind = next(problem for problem in PROBLEMS if problem.code == code)
    problem = ProblemResponse(kind, kind.description, _PROBLEM_EXTRAS.get(code, {}))
    return msgspec.json.decode(render(problem, request_id="4f5c2d1e8b7a46f09d3c6b5a49382716")[2])


def _describe_patches(document: Node) -> None:
    """Describe merge patches: as the bodies that they change, none required, and null for each that has a default."""
    schemas = document["components"]["schemas"]
    for name in ("Account", "Tenant", "Webhook"):
        body = schemas[f"{name}Body"]
        properties = {
            key: schema
            if "oneOf" in schema or key in body.get("required", ())
            # Without the default, which a generated client would send.
            else {"oneOf": [{word: value for word, value in schema.items() if word != "default"}, {"type": "null"}]}
            for key, schema in body["properties"].items()
        }
        text = _ENCODER.encode(body | {"properties": properties, "required": []})
        schemas[f"{name}Patch"] = msgspec.json.decode(text.replace(b'Body"', b'Patch"'))
    for path, name in (("accounts", "Account"), ("tenants", "Tenant")):
        (media,) = document["paths"][f"/admin/v1/{path}/{{name}}"]["patch"]["requestBody"]["content"].values()
        media["schema"] = {"$ref": f"#/components/schemas/{name}Patch"}


def _refer_headers(names: Iterable[str], components: Node) -> Node:
    names = sorted(names)  # Litestar's order is random
    components["headers"] |= {name: _HEADER_COMPONENTS[name] for name in names}
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _unwrap(schema: Node, *, nullable: bool = False) -> Node:
    """Replace a choice of one by its option: client generators would make a type of its own for it.

    Litestar writes such choices for optional fields, and adds null to parameters and contents, which are never null.
    """
    choice = "allOf" if "allOf" in schema else "oneOf"
    options: list[Node] = [option for option in schema.get(choice, ()) if nullable or option != {"type": "null"}]
    if len(options) != 1:
        return schema
    return options[0] | {key: value for key, value in schema.items() if key != choice}


def tenants_config() -> OpenAPIConfig:
    return openapi.openapi_config(
        title="Imaging Gateway",
        description="Upscale, vectorize, restore faces, make seamless: submit an image, follow its task, fetch the "
        "result. Send your token as `Authorization: Bearer TOKEN`. Errors are "
        "[problem documents](docs/problems) whose `detail` explains what to do.",
        bearer="Your token, beginning with `igw_`. The operators of the gateway make and revoke it.",
        tags={
            "Tasks": "Submit an image, and follow its task.",
            "Quota": "Your remaining quota.",
            "Usage": "Your spending, and the outcome of each submission.",
            WEBHOOKS_TAG: "Requests that the gateway sends to you: a task has ended, or much of a limit is used.",
            "Old clients": "The upstream's own protocol, for programs that were written against it: change the base "
            "address, and the `user_key` to your token. Every response is HTTP 200.",
            "Service": "State of the process.",
        },
    )


def operators_config() -> OpenAPIConfig:
    return openapi.openapi_config(
        title="Imaging Gateway: operators",
        description="Accounts at the upstream, the tenants that spend them, and their tokens. `PATCH` changes only "
        "the fields it has. `PUT` replaces: omitted fields get their defaults, only secrets are kept. Send your "
        "token as `Authorization: Bearer TOKEN`. Every change is logged with your name; with the role `read-only` you "
        "can make none.",
        bearer="An operator's token.",
        tags={
            "Registry": "Accounts, tenants and tokens.",
            "Tasks": "Tasks of all tenants.",
            "Usage": "Spending of tenants, the outcome of each submission, and refunds.",
            "Webhooks": "Secrets that sign webhooks, and failed deliveries.",
            "Service": "State of the process, and the time of the ledger.",
        },
    )
