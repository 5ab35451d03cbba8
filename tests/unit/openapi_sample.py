"""A sample OpenAPI document: shapes that Litestar generates, and some that only the standard allows."""

from __future__ import annotations

from typing import Any

Node = dict[str, Any]

_MEANINGS = {
    "malformed-request": "Mend the request: its multipart body can't be read.",
    "unauthenticated": "Send a token that is known and has not run out.",
    "balance-exhausted": "The upstream account can't pay at the moment; `Retry-After` says when to look again.",
    "not-found": "There is no such thing, or it is not yours.",
    "image-too-large": "Send a smaller image.",
    "invalid-options": "Mend the fields that `errors` names.",
    "quota-exceeded": "Wait for the window that `violated_policies` names.",
    "too-many-active-tasks": "Wait for a task to end.",
    "submission-unknown": "It was sent and may have been charged; `submission_id` names it in the usage.",
}
_UPSCALE: Node = {
    "model": {
        "type": "string",
        "default": "general",
        "examples": ["general"],
        "description": "A name of the catalogue.",
    },
    "scale": {"type": "number", "minimum": 1.0, "maximum": 8.0, "default": 2.0, "description": "Growth factor."},
    "noise": {"type": "number", "minimum": 1.0, "maximum": 1.1, "default": 1.003},
    "steps": {"type": "integer", "minimum": 20.0, "maximum": 40.0, "default": 30, "description": "More is slower."},
    "high_fidelity": {"type": "boolean", "default": False, "description": "Stay closer to the original."},
    "prompt": {"type": "string", "maxLength": 2000, "default": "", "description": "What the image shows."},
    "vector": {"type": "boolean", "default": False, "description": "Make a vector image of the result too."},
}
_COLORS: Node = {"colors": {"type": "integer", "minimum": 2, "maximum": 16, "default": 5, "examples": [8]}}
_FIT: Node = {"fit": {"type": "number", "minimum": 0.1, "maximum": 0.9, "default": 0.5, "examples": [0.3]}}
_COMMON: Node = {
    "image": {
        "type": "string",
        "format": "binary",
        "contentMediaType": "application/octet-stream",
        "description": "PNG, JPEG or WebP.",
    },
    "metadata": {
        "type": "string",
        "contentMediaType": "application/json",
        "description": "A JSON object of strings, given back untouched.",
    },
    "webhook_url": {"oneOf": [{"type": "string", "format": "uri"}, {"type": "null"}]},
}
_PREFER: Node = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": "`wait=N`: wait for the end up to N seconds, 1 to 60.",
    "schema": {"oneOf": [{"type": "string"}, {"type": "null"}], "description": "wait=N"},
}
_TASK_ID: Node = {"name": "task_id", "in": "path", "required": True, "schema": {"type": "string"}}


def document() -> Node:
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Imaging Gateway",
            "version": "1.2.3",
            "description": "Upscale, vectorise, restore faces and make images tile.\n\n"
            "A submission costs money, so:\n\n- send an `Idempotency-Key`\n- read `Retry-After`",
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}],
        "tags": [
            {"name": "Tasks", "description": "Submit an image, follow what becomes of it, fetch the result."},
            {"name": "Quota and usage"},
            {"name": "Old clients", "description": "The upstream's own protocol."},
        ],
        "paths": {
            "/v1/tasks/upscale": {"post": _submit("Upscale", "Redraw in high definition.", _UPSCALE | _COLORS)},
            "/v1/tasks/vectorize": {"post": _submit("Vectorize", "For images of few colours.", _COLORS)},
            "/v1/tasks/face-enhance": {"post": _submit("Face enhance", "Restore the faces in an image.", {})},
            "/v1/tasks/seamless": {"post": _submit("Seamless", "Make an image tile.", _FIT)},
            "/v1/tasks/{task_id}": {"get": _read_task()},
            "/v1/tasks": {"get": _list_tasks()},
            "/v1/tasks/{task_id}/artifacts/{name}": {"get": _artifact()},
            "/v1/tasks/{task_id}/events": {"get": _events()},
            "/v1/quota": {"get": _quota()},
            "/api/check_task_status": {"post": _legacy()},
            "/admin/v1/tenants/{name}": {"put": _tenant(), "delete": _deletion()},
            "/healthz": {"get": {"security": [{}], "responses": {"200": {"description": "The process lives."}}}},
        },
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "A tenant's token, as `Bearer`."},
            },
            "responses": {"Nothing": {"description": "Done; there is nothing to say."}},
        },
    }


def _problems(**codes: tuple[str, ...]) -> Node:
    return {
        status.removeprefix("s"): {
            "description": "\n".join(f"- `{code}`: {_MEANINGS[code]}" for code in names),
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status, names in codes.items()
    }


def _task_answer(description: str) -> Node:
    return {
        "description": description,
        "headers": {"Location": {"schema": {"type": "string"}, "description": "Where the task is."}},
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Task"}}},
    }


def _submit(summary: str, description: str, options: Node) -> Node:
    form = {"type": "object", "properties": {**_COMMON, **options}, "required": ["image"]}
    refused: Node = _problems(
        s400=("malformed-request",),
        s401=("unauthenticated",),
        s402=("balance-exhausted",),
        s413=("image-too-large",),
        s422=("invalid-options",),
        s429=("quota-exceeded", "too-many-active-tasks"),
        s504=("submission-unknown",),
    )
    refused["402"]["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
    return {
        "tags": ["Tasks"],
        "summary": summary,
        "description": description,
        "parameters": [
            _PREFER,
            {
                "name": "Idempotency-Key",
                "in": "header",
                "schema": {"type": "string", "maxLength": 255, "examples": ["order-4711"]},
                "description": "The same key and content lead to the first submission, and are paid once.",
            },
        ],
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
        "responses": {"201": _task_answer("The task was accepted"), **refused},
    }


def _read_task() -> Node:
    return {
        "tags": ["Tasks"],
        "summary": "Read a task",
        "parameters": [_TASK_ID, _PREFER],
        "responses": {
            "200": _task_answer("The task as it stands"),
            **_problems(s401=("unauthenticated",), s404=("not-found",)),
            "304": {"description": "It has not changed."},
        },
    }


def _list_tasks() -> Node:
    state = {"oneOf": [{"$ref": "#/components/schemas/State"}, {"type": "null"}]}
    limit = {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}
    return {
        "tags": ["Tasks"],
        "summary": "List tasks",
        "parameters": [
            {"name": "state", "in": "query", "schema": state},
            {"name": "limit", "in": "query", "schema": limit, "examples": {"many": {"value": 50}}},
            {"name": "cursor", "in": "query", "schema": {"type": "string"}, "description": "From `next_cursor`."},
        ],
        "responses": {
            "200": {
                "description": "The newest first",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/TaskList"}}},
            }
        },
    }


def _artifact() -> Node:
    name = {"type": "string", "enum": ["image", "vector", "grid"]}
    return {
        "tags": ["Tasks"],
        "summary": "Fetch a result",
        "parameters": [_TASK_ID, {"name": "name", "in": "path", "required": True, "schema": name}],
        "responses": {
            "200": {"description": "The result's bytes", "content": {"application/octet-stream": {}}},
            **_problems(s404=("not-found",)),
        },
    }


def _events() -> Node:
    answer = {"description": "Its states until the end", "content": {"text/event-stream": {}}}
    return {"tags": ["Tasks"], "parameters": [_TASK_ID], "responses": {"200": answer}}


def _quota() -> Node:
    policies = {"policies": [{"window": "day", "limit": 100, "used": 3}], "payable": True}
    return {
        "tags": ["Quota and usage"],
        "summary": "What is left",
        "responses": {
            "200": {
                "description": "Every policy",
                "content": {
                    "application/json": {"schema": {"type": "object"}, "examples": {"day": {"value": policies}}}
                },
            }
        },
    }


def _legacy() -> Node:
    form = {
        "type": "object",
        "properties": {"user_key": {"type": "string", "format": "password"}, "task_id": {"type": "string"}},
        "required": ["user_key", "task_id"],
    }
    return {
        "tags": ["Old clients"],
        "security": [{}],
        "summary": "Check a task",
        "deprecated": True,
        "requestBody": {"content": {"application/x-www-form-urlencoded": {"schema": form}}},
        "responses": {"200": {"description": "Always, with `err_code`"}},
    }


def _tenant() -> Node:
    return {
        "tags": ["Operators"],
        "summary": "Put a tenant",
        "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
        "requestBody": {
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/Tenant"},
                    "examples": {"plain": {"value": {"accounts": ["main"], "note": "it's"}}},
                }
            }
        },
        "responses": {"200": {"description": "The tenant"}},
    }


def _deletion() -> Node:
    force = {"name": "force", "in": "query", "required": True, "schema": {"type": "boolean"}}
    nothing = {"$ref": "#/components/responses/Nothing"}
    return {"tags": ["Operators"], "summary": "Delete", "parameters": [force], "responses": {"204": nothing}}


def _schemas() -> Node:
    moment = {"type": "string", "format": "date-time"}
    return {
        "Kind": {"type": "string", "enum": ["upscale", "vectorize", "face-enhance", "seamless"]},
        "State": {"type": "string", "enum": ["queued", "running", "succeeded", "failed"]},
        "Artifact": {
            "type": "object",
            "description": "One result of a task.",
            "properties": {"name": {"type": "string", "enum": ["image"]}, "href": {"type": "string"}},
            "required": ["name", "href"],
        },
        "Task": {
            "type": "object",
            "description": "A task as the gateway shows it.",
            "properties": {
                "id": {"type": "string", "examples": ["task_8fK2"]},
                "kind": {"$ref": "#/components/schemas/Kind"},
                "state": {"$ref": "#/components/schemas/State"},
                "created_at": moment,
                "finished_at": {"oneOf": [{"type": "null"}, moment]},
                "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
                "artifacts": {"type": "array", "items": {"$ref": "#/components/schemas/Artifact"}},
                "parent": {"oneOf": [{"$ref": "#/components/schemas/Task"}]},
            },
            "required": ["id", "kind", "state"],
        },
        "TaskList": {
            "type": "object",
            "properties": {
                "items": {"type": "array", "items": {"$ref": "#/components/schemas/Task"}},
                "next_cursor": {"type": ["string", "null"]},
            },
        },
        "Problem": {"type": "object", "properties": {"code": {"type": "string"}, "status": {"type": "integer"}}},
        "Limits": {"type": "object", "properties": {"tasks": {"type": "integer", "minimum": 0}}},
        "Tenant": {
            "allOf": [
                {"$ref": "#/components/schemas/Limits"},
                {"type": "object", "properties": {"accounts": {"type": "array", "items": {"type": "string"}}}},
            ],
            "description": "Whom the gateway works for.",
        },
    }
