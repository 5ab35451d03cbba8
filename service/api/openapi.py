"""Parts of the OpenAPI document that routes declare: form bodies, problems, headers, security."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, cast

import msgspec
from litestar import Router
from litestar.connection import ASGIConnection
from litestar.datastructures import ResponseHeader
from litestar.exceptions import NotFoundException
from litestar.handlers import BaseRouteHandler
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import (
    Components,
    Contact,
    Example,
    License,
    OpenAPIMediaType,
    Operation,
    RequestBody,
    Schema,
    SecurityScheme,
    Tag,
)
from msgspec import UNSET, Meta, Struct, UnsetType

from service import __version__
from service.api.errors import (
    HEADERS_TOO_LARGE,
    MALFORMED_REQUEST,
    MEDIA_TYPE,
    PROBLEMS,
    RATE_LIMITED,
    UNAUTHENTICATED,
    ProblemType,
)
from service.domain.errors import UnreachableReason
from service.domain.tasks import MAX_METADATA_BYTES, OPTIONS, Catalogue, Kind
from service.domain.webhooks import MAX_URL_CHARS

UNSERVED_PATH = "/schema"
"""Path of the documents that Litestar always serves; every request to it is refused with 404."""

SUBMIT_SUMMARIES: Mapping[Kind, str] = {
    Kind.UPSCALE: "Redraw an image in high definition",
    Kind.VECTORIZE: "Turn a bitmap of few colours into a vector image",
    Kind.FACE_ENHANCE: "Restore the faces in an image",
    Kind.SEAMLESS: "Make an image tile without seams",
}


class FieldFault(Struct, frozen=True):
    """An invalid field and its expected format."""

    field: str
    detail: str


class ViolatedPolicy(Struct, frozen=True):
    """A violated policy of the tenant; `resets_at` is null if it never resets."""

    policy: Annotated[str, Meta(examples=["day-tasks"])]
    limit: Annotated[float, Meta(description="In tasks, or in yuan.", examples=[100])]
    resets_at: datetime | None


class Problem(Struct, frozen=True):
    """A problem document (RFC 9457), possibly with more members."""

    type: Annotated[str, Meta(description="Identifier of its kind, not to be fetched.")]
    title: Annotated[str, Meta(description="Its kind in words, constant.")]
    status: int
    detail: Annotated[str, Meta(description="What to do about it.")]
    instance: Annotated[str, Meta(description="The id of the request, for questions to the operators.")]
    code: Annotated[str, Meta(description="Its kind, for programs.")]
    errors: Annotated[list[FieldFault], Meta(description="Of `invalid-options`.")] | UnsetType = UNSET
    violated_policies: Annotated[list[ViolatedPolicy], Meta(description="Of status 429.")] | UnsetType = UNSET
    upstream_reason: (
        Annotated[str, Meta(description="Of `upstream-rejected`, in the upstream's words.")] | UnsetType
    ) = UNSET
    submission_id: Annotated[str, Meta(description="Of `submission-unknown`.")] | UnsetType = UNSET
    reason: Annotated[UnreachableReason, Meta(description="Of `image-unreachable`.")] | UnsetType = UNSET


NOT_MODIFIED: dict[int, ResponseSpec] = {
    304: ResponseSpec(None, description="The version named by If-None-Match is current", generate_examples=False)
}

_FILE_SCHEMA = {
    "type": "string",
    "format": "binary",  # of OpenAPI 3.0, the only one that most client generators support
    "contentMediaType": "application/octet-stream",
}


_ONE_SOURCE = {
    "additionalProperties": False,
    "if": {"properties": {"image": {}}, "required": ["image"]},
    "then": {"properties": {"image_url": False}},
    "else": {"properties": {"image_url": {}}, "required": ["image_url"]},
}
"""Exactly one of both. Client generators ignore these words, but not `oneOf`, from which they make types."""


def problem_responses(*codes_or_statuses: int | str) -> dict[int, ResponseSpec]:
    """Return the problems of an operation, by codes, or by statuses for all of that status.

    Where a token is needed, too many wrong ones are refused.
    """
    by_status: dict[int, list[ProblemType]] = {}
    for kind in PROBLEMS:
        is_named = kind.code in codes_or_statuses or kind.status in codes_or_statuses
        if is_named or (kind is RATE_LIMITED and UNAUTHENTICATED.status in codes_or_statuses):
            by_status.setdefault(kind.status, []).append(kind)
    return {status: _problem_response(kinds) for status, kinds in by_status.items()}


def operator_problems(*codes_or_statuses: int | str) -> dict[int, ResponseSpec]:
    """Return the problems of an operators' operation: these, and those of the token, body and query of each."""
    return problem_responses(401, 415, "invalid-options", *codes_or_statuses)


def _problem_response(kinds: Sequence[ProblemType]) -> ResponseSpec:
    return ResponseSpec(
        Problem,
        description="\n".join(f"- `{kind.code}`: {kind.description}" for kind in kinds),
        media_type=MEDIA_TYPE,
        generate_examples=False,
        examples=[Example(id=kind.code) for kind in kinds],  # for `openapi_document`
    )


UNREADABLE_REQUEST = problem_responses(MALFORMED_REQUEST.code, HEADERS_TOO_LARGE.code)
"""Problems that the server reports for every path, of operations that have no others."""


def response_headers(*names: str) -> list[ResponseHeader]:
    """Return the headers of a success; `openapi_document` describes them."""
    return [ResponseHeader(name=name, documentation_only=True) for name in names]


def submit_operation(kind: Kind, catalogue: Catalogue) -> type[Operation]:
    """Return an operation that takes an image and the options of a kind."""
    options = option_schemas(kind)
    if kind is Kind.UPSCALE:
        options["model"]["examples"] = list(catalogue.models)
        options["style"]["examples"] = list(catalogue.styles)
    properties = {
        "image": _FILE_SCHEMA | {"description": "The image: PNG, JPEG or WebP."},
        "image_url": {
            "type": "string",
            "format": "uri",
            "description": "The address of the image, whose host the operators must have allowed you, or a small image "
            "itself as `data:image/png;base64,...`.",
        },
        **options,
        "metadata": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"type": "object", "additionalProperties": {"type": "string"}},
            "maxLength": MAX_METADATA_BYTES,
            "description": f"A JSON object of strings, at most {MAX_METADATA_BYTES} bytes, returned unchanged.",
            "examples": ['{"order": "4711"}'],
        },
        "webhook_url": {
            "type": "string",
            "format": "uri",
            "maxLength": MAX_URL_CHARS,
            "description": "Receives the event of this task instead of your default address. The operators must have "
            "allowed its host.",
        },
    }
    # Not the JSON body too: some client generators would take it alone, and others rename what they make of the form.
    return _form_operation("multipart/form-data", properties, **_ONE_SOURCE)


def legacy_operation(part: str | None, names: Mapping[str, str], kind: Kind | None = None) -> type[Operation]:
    """Return an operation of the upstream's protocol, with its names of the options."""
    properties: dict[str, Any] = {"user_key": {"type": "string", "format": "password", "description": "Your token."}}
    if part is None or kind is None:
        properties |= {name: {"type": "string"} for name in names}
        return _form_operation("application/x-www-form-urlencoded", properties, required=["user_key", *names])
    options = option_schemas(kind)
    properties[part] = _FILE_SCHEMA | {"description": "The image."}
    properties |= {name: options[option] for name, option in names.items()}
    return _form_operation("multipart/form-data", properties, required=["user_key", part])


def _form_operation(media_type: str, properties: Mapping[str, Any], **keywords: Any) -> type[Operation]:
    """Return an operation that reads its form from the stream, so that Litestar can't describe it."""
    schema = {"type": "object", "properties": properties} | keywords

    @dataclass
    class FormOperation(Operation):
        def __post_init__(self) -> None:
            # Litestar copies what is no `Schema` as it is.
            content = {media_type: OpenAPIMediaType(schema=cast("Schema", schema))}
            self.request_body = RequestBody(required=True, content=content)

    return FormOperation


def option_schemas(kind: Kind) -> dict[str, dict[str, Any]]:
    """Return the schemas of the options of a kind, from the annotations that validate them."""
    _, components = msgspec.json.schema_components([OPTIONS[kind]])
    return dict(components[OPTIONS[kind].__name__]["properties"])


def openapi_config(title: str, description: str, bearer: str, tags: Mapping[str, str]) -> OpenAPIConfig:
    config = OpenAPIConfig(
        title=title,
        version=__version__,
        description=description,
        contact=Contact(name="Operators of the Imaging Gateway"),
        license=License(name="Proprietary", identifier="LicenseRef-Proprietary"),
        security=[{"token": []}],
        components=Components(
            security_schemes={"token": SecurityScheme(type="http", scheme="bearer", description=bearer)}
        ),
        tags=[Tag(name=name, description=text) for name, text in tags.items()],
        openapi_router=Router(UNSERVED_PATH, route_handlers=[], include_in_schema=False, guards=[_refuse_request]),
        operation_id_creator=lambda handler, _method, _path: handler.name or handler.handler_name.replace("_", "-"),
        use_handler_docstrings=False,
    )
    # Set afterwards: passed an empty list, Litestar adds all its renderers, whose pages load third-party scripts.
    config.render_plugins = []
    return config


def _refuse_request(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    connection.scope["path_template"] = ""  # counted as an unmatched route
    raise NotFoundException
