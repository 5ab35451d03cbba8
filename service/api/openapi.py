"""What the code can't say of itself in the OpenAPI document: multipart bodies, problems, security."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import msgspec
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
from msgspec import Meta, Struct

from service import __version__
from service.api.problems import MEDIA_TYPE, PROBLEMS
from service.domain.task import MAX_METADATA_BYTES, OPTIONS, Catalogue, Kind

SUBMIT_SUMMARIES: Mapping[Kind, str] = {
    Kind.UPSCALE: "Redraw an image in high definition",
    Kind.VECTORIZE: "Turn a bitmap of few colours into a vector image",
    Kind.FACE_ENHANCE: "Restore the faces in an image",
    Kind.SEAMLESS: "Make an image tile without seams",
}


class ProblemView(Struct, frozen=True):
    """A problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: Annotated[str, Meta(description="What to do about it.")]
    instance: Annotated[str, Meta(description="The id of the request, for questions to the operators.")]
    code: str


NOT_MODIFIED: dict[int, ResponseSpec] = {
    304: ResponseSpec(None, description="It is still the version named by If-None-Match.", generate_examples=False)
}


def problems(*statuses: int) -> dict[int, ResponseSpec]:
    """The problems an operation may answer with, by status, each with its codes and when they occur."""
    return {status: _problem(status) for status in statuses}


def _problem(status: int) -> ResponseSpec:
    kinds = [each for each in PROBLEMS if each.status == status]
    return ResponseSpec(
        ProblemView,
        description="\n".join(f"- `{each.code}`: {each.when}" for each in kinds),
        media_type=MEDIA_TYPE,
        generate_examples=False,
        examples=[Example(value=_example(each.code, each.title, status)) for each in kinds[:1]],
    )


def _example(code: str, title: str, status: int) -> dict[str, Any]:
    return {
        "type": f"urn:imaging-gateway:problem:{code}",
        "title": title,
        "status": status,
        "detail": "What to do about it.",
        "instance": "the request's id",
        "code": code,
    }


@dataclass
class _FormOperation(Operation):
    """An operation whose body is read from the stream, so that Litestar does not know it."""

    body: ClassVar[RequestBody]

    def __post_init__(self) -> None:
        self.request_body = self.body


def submit_operation(kind: Kind, catalogue: Catalogue) -> type[Operation]:
    """An operation that takes an image and the options of a kind."""
    properties = {"image": _file("The image: PNG, JPEG or WebP.")} | _options(kind, catalogue)
    properties["metadata"] = Schema(
        type=OpenAPIType.STRING,
        content_media_type="application/json",
        description=f"A JSON object of strings, at most {MAX_METADATA_BYTES} bytes, given back untouched.",
    )
    return _form_operation(properties, required=["image"], media_type="multipart/form-data")


def legacy_operation(part: str | None, names: Mapping[str, str], kind: Kind | None = None) -> type[Operation]:
    """An operation of the upstream's protocol, with its names for the options."""
    properties = {"user_key": Schema(type=OpenAPIType.STRING, description="A token of the gateway.")}
    if part is None or kind is None:
        properties |= {name: Schema(type=OpenAPIType.STRING) for name in names}
        return _form_operation(properties, ["user_key", *names], "application/x-www-form-urlencoded")
    ours = _options(kind, None)
    properties |= {part: _file("The image.")} | {theirs: ours[option] for theirs, option in names.items()}
    return _form_operation(properties, ["user_key", part], "multipart/form-data")


def _form_operation(properties: dict[str, Schema], required: list[str], media_type: str) -> type[Operation]:
    schema = Schema(type=OpenAPIType.OBJECT, properties=dict(properties), required=required)
    body = RequestBody(required=True, content={media_type: OpenAPIMediaType(schema=schema)})
    return type("FormOperation", (_FormOperation,), {"body": body})


def _file(description: str) -> Schema:
    return Schema(type=OpenAPIType.STRING, content_media_type="application/octet-stream", description=description)


def _options(kind: Kind, catalogue: Catalogue | None) -> dict[str, Schema]:
    """The options of a kind as schemas, from the annotations that check them."""
    options = OPTIONS[kind]
    (plain,), components = msgspec.json.schema_components([options])
    described: dict[str, Any] = components[plain["$ref"].rpartition("/")[2]]["properties"]
    schemas = {}
    for name, each in described.items():
        schemas[name] = Schema(
            type=OpenAPIType(each["type"]),
            description=each.get("description"),
            default=each.get("default"),
            minimum=each.get("minimum"),
            maximum=each.get("maximum"),
            max_length=each.get("maxLength"),
        )
    if catalogue and kind is Kind.UPSCALE:
        schemas["model"].examples = list(catalogue.models)
        schemas["style"].examples = list(catalogue.styles)
    return schemas


def config(title: str, description: str, bearer: str) -> OpenAPIConfig:
    """The frame of a port's document. It is served by a route of its own, so that no renderer comes with it."""
    return OpenAPIConfig(
        title=title,
        version=__version__,
        description=description,
        security=[{"token": []}],
        components=Components(
            security_schemes={"token": SecurityScheme(type="http", scheme="bearer", description=bearer)}
        ),
        tags=[Tag(name="tasks"), Tag(name="quota")],
        path="/schema",
        render_plugins=[],
        use_handler_docstrings=False,
    )
