"""The two applications: one for tenants, one for operators. They are made of services, and know no environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from litestar import Litestar, MediaType, Request, Response, Router, get
from litestar.connection import ASGIConnection
from litestar.di import Provide
from litestar.handlers import BaseRouteHandler
from litestar.openapi.config import OpenAPIConfig
from litestar.types import ControllerRouterHandler

from service.api import admin, legacy, openapi, ops, quota, tasks
from service.api.docs import docs_page
from service.api.edge import Edge
from service.api.head import answering_head
from service.api.problems import exception_handlers
from service.domain.tenancy import Tenant
from service.telemetry.metrics import Port
from service.wiring import Services

_TENANTS_TITLE = "Imaging Gateway"
_TENANTS_DESCRIPTION = (
    "Upscale, vectorise, restore faces, make seamless: submit an image, follow its task, fetch the result. "
    "Send your token as `Authorization: Bearer TOKEN`. Whatever goes wrong is a problem document whose `detail` says "
    "what to do."
)
_OPERATORS_TITLE = "Imaging Gateway: operators"
_OPERATORS_DESCRIPTION = (
    "Accounts at the upstream, the tenants that spend them, and their tokens. `PUT` replaces: what is left out gets "
    "its default, only secrets are kept. Send the admin token as `Authorization: Bearer TOKEN`."
)
_ADMIN_BODY_BYTES = 1_000_000


def create_app(services: Services) -> Edge:
    """The tenants' application."""
    app = tenants_app(services)
    return Edge(answering_head(app), metrics=services.metrics, logger=services.logger, port=Port.TENANTS)


def create_ops_app(services: Services) -> Edge:
    """The operators' application."""
    app = operators_app(services)
    return Edge(answering_head(app), metrics=services.metrics, logger=services.logger, port=Port.OPERATORS)


def tenants_app(services: Services) -> Litestar:
    """The tenants' routes, without the edge around them."""
    document: dict[str, bytes] = {}

    @get("/openapi.json", include_in_schema=False)
    async def schema() -> Response[bytes]:
        return Response(document["json"], media_type=MediaType.JSON)

    @get("/docs", include_in_schema=False)
    async def docs() -> Response[bytes]:
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return Response(document["html"], media_type=MediaType.HTML, headers=headers)

    def tenant(request: Request[Any, Any, Any]) -> Tenant:
        return services.tenants.by_request(request)

    v1 = Router(
        "/v1",
        route_handlers=[
            *tasks.routes(
                submit=services.submit,
                follow=services.follow,
                uploads=services.uploads,
                catalogue=services.catalogue,
                poll_seconds=services.poll_seconds,
            ),
            *quota.routes(services.quota),
        ],
        dependencies={"tenant": Provide(tenant, sync_to_thread=False)},
    )
    old = Router(
        "/api",
        route_handlers=legacy.routes(
            tenants=services.tenants,
            submit=services.submit,
            follow=services.follow,
            quota=services.quota,
            uploads=services.uploads,
            catalogue=services.catalogue,
        ),
        tags=["old clients"],
        security=[{}],
    )
    health = Router("/", route_handlers=ops.health_routes(services.lifecycle.health), tags=["service"], security=[{}])
    config = openapi.config(_TENANTS_TITLE, _TENANTS_DESCRIPTION, "A tenant's token, beginning with `igw_`.")
    app = _litestar(services, [v1, old, health, schema, docs], config)
    rendered = app.openapi_schema.to_schema()
    document["json"] = msgspec.json.encode(rendered)
    document["html"] = docs_page(rendered)
    return app


def operators_app(services: Services) -> Litestar:
    """The operators' routes, without the edge around them."""

    def guard(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        services.admin.check(connection)

    admin_routes = Router(
        "/admin/v1",
        route_handlers=admin.routes(operators=services.operators, quota=services.quota),
        guards=[guard],
    )
    health = Router("/", route_handlers=ops.health_routes(services.lifecycle.health), tags=["service"], security=[{}])
    config = openapi.config(_OPERATORS_TITLE, _OPERATORS_DESCRIPTION, "The admin token.")
    return _litestar(services, [admin_routes, health, ops.metrics_route(services.metrics)], config)


def _litestar(services: Services, handlers: Sequence[ControllerRouterHandler], config: OpenAPIConfig) -> Litestar:
    return Litestar(
        handlers,
        openapi_config=config,
        exception_handlers=exception_handlers(services.logger),
        request_max_body_size=_ADMIN_BODY_BYTES,
        logging_config=None,
        pdb_on_exception=False,
    )
