"""The two applications: one for tenants, one for operators. They are made of services, and know no environment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec
from litestar import Litestar, MediaType, Request, Response, Router, get
from litestar.connection import ASGIConnection
from litestar.datastructures import CacheControlHeader
from litestar.di import Provide
from litestar.handlers import BaseRouteHandler
from litestar.openapi.config import OpenAPIConfig
from litestar.routes import HTTPRoute
from litestar.types import ControllerRouterHandler

from service.api import admin, artifacts, legacy, openapi, openapi_document, tasks, usage
from service.api.asgi import HeadMiddleware, RequestMiddleware
from service.api.docs import DOCS_HEADERS, docs_page
from service.api.errors import exception_handlers
from service.api.health import health_routes, metrics_route
from service.api.openapi_document import build_document
from service.api.params import JsonRequest, check_query
from service.api.uploads import refuse_content_encoding
from service.container import Container
from service.domain.tenants import Tenant
from service.telemetry.metrics import Port

_TENANTS_TITLE = "Imaging Gateway"
_TENANTS_DESCRIPTION = (
    "Upscale, vectorise, restore faces, make seamless: submit an image, follow its task, fetch the result. "
    "Send your token as `Authorization: Bearer TOKEN`. Whatever goes wrong is a problem document whose `detail` says "
    "what to do."
)
_TENANTS_BEARER = "Your token, beginning with `igw_`. The operators of the gateway make and revoke it."
_TENANTS_TAGS = {
    "Tasks": "Submit an image, and follow what becomes of it.",
    "Quota": "What you may still spend.",
    "Usage": "What you have spent, and what became of each submission.",
    openapi_document.WEBHOOKS_TAG: "What the gateway sends to you when a task has ended.",
    "Old clients": "The upstream's own protocol, for programs that were written against it: change the base address, "
    "and the `user_key` to your token. Every answer is HTTP 200.",
    "Service": "The state of the process that answers.",
}
_OPERATORS_TITLE = "Imaging Gateway: operators"
_OPERATORS_DESCRIPTION = (
    "Accounts at the upstream, the tenants that spend them, and their tokens. `PUT` replaces: what is left out gets "
    "its default, only secrets are kept. Send the admin token as `Authorization: Bearer TOKEN`."
)
_OPERATORS_BEARER = "The admin token."
_OPERATORS_TAGS = {
    "Registry": "Accounts, tenants and tokens.",
    "Usage": "What tenants have spent, what became of each submission, and refunds.",
    "Webhooks": "The secrets that sign what tenants are told, and what could not be delivered.",
    "Service": "The state of the process that answers, and the time of the ledger.",
}
_ADMIN_BODY_BYTES = 1_000_000


def create_app(services: Container) -> RequestMiddleware:
    """The tenants' application."""
    app = tenants_app(services)
    return _add_middleware(app, services, Port.TENANTS)


def create_ops_app(services: Container) -> RequestMiddleware:
    """The operators' application."""
    app = operators_app(services)
    return _add_middleware(app, services, Port.OPERATORS)


def _add_middleware(app: Litestar, services: Container, port: Port) -> RequestMiddleware:
    _preregister_route_metrics(services, app, port)
    return RequestMiddleware(
        HeadMiddleware(app), metrics=services.metrics, logger=services.logger, port=port, tracer=services.tracer
    )


def tenants_app(services: Container) -> Litestar:
    """The tenants' routes, without the edge around them."""

    @cache  # rendered when somebody first asks for it
    def rendered() -> tuple[bytes, bytes]:
        described = build_document(app)
        return msgspec.json.encode(described), docs_page(described)

    @get("/openapi.json", include_in_schema=False)
    async def schema() -> Response[bytes]:
        return Response(rendered()[0], media_type=MediaType.JSON, headers={"Cache-Control": "no-cache"})

    @get("/docs", include_in_schema=False)
    async def docs() -> Response[bytes]:
        return Response(rendered()[1], media_type=MediaType.HTML, headers=DOCS_HEADERS)

    def tenant(request: Request[Any, Any, Any]) -> Tenant:
        return services.tenant_auth.authenticate(request)

    task_routes = tasks.task_routes(
        submitter=services.submitter,
        reader=services.task_reader,
        uploads=services.uploads,
        catalogue=services.catalogue,
        estimator=services.task_cache.durations,
    )
    artifact_routes = artifacts.artifact_routes(services.artifact_reader)
    event_routes = tasks.event_routes(reader=services.task_reader, tenant_auth=services.tenant_auth)
    usage_routes = [*usage.usage_routes(services.usage), *usage.submission_routes(services.submissions)]
    v1 = Router(
        "/v1",
        route_handlers=[
            Router("/", route_handlers=[*task_routes, *event_routes, *artifact_routes], tags=["Tasks"]),
            Router("/", route_handlers=usage.quota_routes(services.quota), tags=["Quota"]),
            Router("/", route_handlers=usage_routes, tags=["Usage"]),
        ],
        dependencies={"tenant": Provide(tenant, sync_to_thread=False)},
    )
    old = Router(
        "/api",
        route_handlers=legacy.legacy_routes(
            tenant_auth=services.tenant_auth,
            submitter=services.submitter,
            reader=services.task_reader,
            quota=services.quota,
            uploads=services.uploads,
            catalogue=services.catalogue,
        ),
        tags=["Old clients"],
        security=[{}],
    )
    health = Router("/", route_handlers=health_routes(services.lifecycle.health), tags=["Service"], security=[{}])
    config = openapi.openapi_config(_TENANTS_TITLE, _TENANTS_DESCRIPTION, _TENANTS_BEARER, _TENANTS_TAGS)
    app = _create_litestar(services, [v1, old, health, schema, docs], config)
    return app


def operators_app(services: Container) -> Litestar:
    """The operators' routes, without the edge around them."""

    def guard(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        services.admin_auth.authenticate(connection)
        refuse_content_encoding(connection.scope)

    registry_routes = [
        *admin.resource_routes(registry_admin=services.registry_admin, quota=services.quota),
        *admin.registry_routes(services.registry_apply, services.registry_admin),
    ]
    usage_routes = [
        *usage.operator_usage_routes(services.usage),
        *usage.operator_submission_routes(services.submissions),
    ]
    webhook_routes = admin.webhook_routes(services.webhook_admin)
    admin_routes = Router(
        "/admin/v1",
        route_handlers=[
            Router("/", route_handlers=registry_routes, tags=["Registry"]),
            Router("/", route_handlers=usage_routes, tags=["Usage"]),
            Router("/", route_handlers=webhook_routes, tags=["Webhooks"]),
            Router("/", route_handlers=admin.clock_routes(services.registry_admin), tags=["Service"]),
        ],
        guards=[guard, check_query],
        request_class=JsonRequest,
        # Each answer shows how things are now, and one of them a token.
        cache_control=CacheControlHeader(no_store=True),
    )
    health = Router("/", route_handlers=health_routes(services.lifecycle.health), tags=["Service"], security=[{}])
    config = openapi.openapi_config(_OPERATORS_TITLE, _OPERATORS_DESCRIPTION, _OPERATORS_BEARER, _OPERATORS_TAGS)
    return _create_litestar(
        services, [admin_routes, health, metrics_route(services.metrics, services.ledger_snapshot)], config
    )


def _preregister_route_metrics(services: Container, app: Litestar, port: Port) -> None:
    """Have the faults of each route counted from zero."""
    served = (route for route in app.routes if not route.path.startswith(openapi.UNSERVED_PATH))
    routes = [route for route in served if isinstance(route, HTTPRoute)]
    services.metrics.preregister_routes(
        port, [(str(method), route.path_format) for route in routes for method in route.methods]
    )


def _create_litestar(
    services: Container, handlers: Sequence[ControllerRouterHandler], config: OpenAPIConfig
) -> Litestar:
    return Litestar(
        handlers,
        openapi_config=config,
        exception_handlers=exception_handlers(services.logger),
        request_max_body_size=_ADMIN_BODY_BYTES,
        logging_config=None,
        pdb_on_exception=False,
    )
