"""What the code can't say of itself in the OpenAPI document: multipart bodies, problems, security."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, ClassVar, cast

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
    Example,
    OpenAPIMediaType,
    OpenAPIType,
    Operation,
    RequestBody,
    Schema,
    SecurityScheme,
    Tag,
)
from litestar.openapi.spec.enums import OpenAPIFormat
from msgspec import UNSET, Meta, Struct, UnsetType

from service import __version__
from service.api.errors import MEDIA_TYPE, PROBLEMS, ProblemType
from service.domain.media import EXTENSIONS
from service.domain.tasks import MAX_METADATA_BYTES, OPTIONS, Catalogue, Kind
from service.domain.webhooks import MAX_URL_CHARS

UNSERVED_PATH = "/schema"
"""Where Litestar serves something of each document, whatever it is told: nothing is found there."""

SUBMIT_SUMMARIES: Mapping[Kind, str] = {
    Kind.UPSCALE: "Redraw an image in high definition",
    Kind.VECTORIZE: "Turn a bitmap of few colours into a vector image",
    Kind.FACE_ENHANCE: "Restore the faces in an image",
    Kind.SEAMLESS: "Make an image tile without seams",
}


class FieldFault(Struct, frozen=True):
    """A faulty field, and what it must be instead."""

    field: str
    detail: str


class ViolatedPolicy(Struct, frozen=True):
    """A policy of the tenant that refused; `resets_at` is null where nothing resets by itself."""

    policy: Annotated[str, Meta(examples=["day-tasks"])]
    limit: Annotated[float, Meta(description="In tasks, or in yuan.", examples=[100])]
    resets_at: datetime | None


class Problem(Struct, frozen=True):
    """A problem document (RFC 9457). More members may come beside these."""

    type: Annotated[str, Meta(description="Its kind, as an identifier that is not to be fetched.")]
    title: Annotated[str, Meta(description="Its kind in words, always the same.")]
    status: int
    detail: Annotated[str, Meta(description="What to do about it.")]
    instance: Annotated[str, Meta(description="The id of the request, for questions to the operators.")]
    code: Annotated[str, Meta(description="Its kind, to branch on.")]
    errors: Annotated[list[FieldFault], Meta(description="Of `invalid-options`.")] | UnsetType = UNSET
    violated_policies: Annotated[list[ViolatedPolicy], Meta(description="Of status 429.")] | UnsetType = UNSET
    upstream_reason: Annotated[str, Meta(description="Of `upstream-rejected`, in its words.")] | UnsetType = UNSET
    submission_id: Annotated[str, Meta(description="Of `submission-unknown`.")] | UnsetType = UNSET


NOT_MODIFIED: dict[int, ResponseSpec] = {
    304: ResponseSpec(None, description="It is still the version named by If-None-Match.", generate_examples=False)
}
FILE_HEADERS = ("Content-Disposition", "ETag", "Last-Modified", "Accept-Ranges", "Cache-Control")
FILE_TYPES = tuple(EXTENSIONS)
"""What an answer that is a file comes with, and what it can be."""


def problem_responses(*codes_or_statuses: int | str) -> dict[int, ResponseSpec]:
    """The problems an operation may answer with: those of these codes, and all those of these statuses."""
    found = [
        problem for problem in PROBLEMS if problem.code in codes_or_statuses or problem.status in codes_or_statuses
    ]
    return {
        status: _problem_response([item for item in found if item.status == status])
        for status in {e.status for e in found}
    }


def _problem_response(kinds: Sequence[ProblemType]) -> ResponseSpec:
    return ResponseSpec(
        Problem,
        description="\n".join(f"- `{kind.code}`: {kind.description}" for kind in kinds),
        media_type=MEDIA_TYPE,
        generate_examples=False,
        examples=[Example(id=kind.code) for kind in kinds],  # shown by `service.api.document`
    )


def response_headers(*names: str) -> list[ResponseHeader]:
    """The headers of an operation's success, by name; `service.api.document` says what each means."""
    return [ResponseHeader(name=name, documentation_only=True) for name in names]


@dataclass
class _FormOperation(Operation):
    """An operation whose body is read from the stream, so that Litestar does not know it."""

    body: ClassVar[RequestBody]

    def __post_init__(self) -> None:
        self.request_body = self.body


def submit_operation(kind: Kind, catalogue: Catalogue) -> type[Operation]:
    """An operation that takes an image and the options of a kind."""
    properties = {"image": _file_schema("The image: PNG, JPEG or WebP.")} | _option_schemas(kind, catalogue)
    properties["metadata"] = Schema(
        type=OpenAPIType.STRING,
        content_media_type="application/json",
        description=f"A JSON object of strings, at most {MAX_METADATA_BYTES} bytes, given back untouched.",
        examples=['{"order": "4711"}'],
    )
    properties["webhook_url"] = Schema(
        type=OpenAPIType.STRING,
        format=OpenAPIFormat.URI,
        max_length=MAX_URL_CHARS,
        description="Where to tell the end of this task, instead of at your usual address. Its host has to be one that "
        "the operators have allowed you.",
    )
    return _form_operation(properties, ["image"], "multipart/form-data", strict=True)


def legacy_operation(part: str | None, names: Mapping[str, str], kind: Kind | None = None) -> type[Operation]:
    """An operation of the upstream's protocol, with its names for the options."""
    # Litestar does not list this format of OpenAPI's.
    secret = cast("OpenAPIFormat", "password")
    properties = {"user_key": Schema(type=OpenAPIType.STRING, format=secret, description="Your token.")}
    if part is None or kind is None:
        properties |= {name: Schema(type=OpenAPIType.STRING) for name in names}
        return _form_operation(properties, ["user_key", *names], "application/x-www-form-urlencoded")
    ours = _option_schemas(kind, None)
    properties |= {part: _file_schema("The image.")} | {theirs: ours[option] for theirs, option in names.items()}
    return _form_operation(properties, ["user_key", part], "multipart/form-data")


def _form_operation(
    properties: Mapping[str, Schema], required: list[str], media_type: str, *, strict: bool = False
) -> type[Operation]:
    """An operation with a form; a strict one refuses fields that it does not name."""
    schema = Schema(
        type=OpenAPIType.OBJECT,
        properties=dict(properties),
        required=required,
        additional_properties=False if strict else None,
    )
    body = RequestBody(required=True, content={media_type: OpenAPIMediaType(schema=schema)})
    return type("FormOperation", (_FormOperation,), {"body": body})


def _file_schema(description: str) -> Schema:
    return Schema(
        type=OpenAPIType.STRING,
        format=OpenAPIFormat.BINARY,  # OpenAPI 3.0's mark of a file, the only one that most client generators know
        content_media_type="application/octet-stream",
        description=description,
    )


def _option_schemas(kind: Kind, catalogue: Catalogue | None) -> dict[str, Schema]:
    """The options of a kind as schemas, from the annotations that check them."""
    options = OPTIONS[kind]
    (plain,), components = msgspec.json.schema_components([options])
    described: dict[str, Any] = components[plain["$ref"].rpartition("/")[2]]["properties"]
    schemas = {}
    for name, item in described.items():
        schemas[name] = Schema(
            type=OpenAPIType(item["type"]),
            description=item.get("description"),
            default=item.get("default"),
            minimum=item.get("minimum"),
            maximum=item.get("maximum"),
            max_length=item.get("maxLength"),
        )
    if catalogue and kind is Kind.UPSCALE:
        schemas["model"].examples = list(catalogue.models)
        schemas["style"].examples = list(catalogue.styles)
    return schemas


def openapi_config(title: str, description: str, bearer: str, tags: Mapping[str, str]) -> OpenAPIConfig:
    """The frame of a port's document. It is served by a route of its own, so that no renderer comes with it."""
    made = OpenAPIConfig(
        title=title,
        version=__version__,
        description=description,
        security=[{"token": []}],
        components=Components(
            security_schemes={"token": SecurityScheme(type="http", scheme="bearer", description=bearer)}
        ),
        tags=[Tag(name=name, description=about) for name, about in tags.items()],
        openapi_router=Router(UNSERVED_PATH, route_handlers=[], include_in_schema=False, guards=[_refuse_request]),
        use_handler_docstrings=False,
    )
    made.render_plugins = []  # given an empty list, Litestar takes all that it has, whose pages load scripts of others
    return made


def _refuse_request(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """Refuse what Litestar serves of a document in any case: its JSON, and a page that says that nothing is found."""
    connection.scope["path_template"] = ""  # it counts as unmatched, like all that is found nowhere
    raise NotFoundException
