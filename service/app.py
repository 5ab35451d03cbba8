"""The two applications, for tenants and for operators, out of a container."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from litestar import Litestar, Request, Router, get
from litestar.connection import ASGIConnection
from litestar.datastructures import CacheControlHeader, ResponseHeader
from litestar.di import Provide
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.openapi.config import OpenAPIConfig
from litestar.plugins import PluginProtocol
from litestar.plugins.core import MsgspecDIPlugin
from litestar.response import Redirect
from litestar.routes import HTTPRoute
from litestar.types import ControllerRouterHandler

from service.api import admin, artifacts, legacy, openapi, registry, tasks, usage
from service.api.asgi import HeadMiddleware, RequestMiddleware
from service.api.auth import FailureLimiter, metrics_guard
from service.api.compression import CompressionMiddleware, static_compression
from service.api.docs import Site, docs_routes
from service.api.errors import exception_handlers
from service.api.guides import GUIDE_NAMES, OPERATOR_GUIDE_NAMES, guide_assets, render_cards
from service.api.health import health_routes, metrics_route
from service.api.openapi_document import operators_config, tenants_config
from service.api.pages import Link
from service.api.params import JsonRequest, check_query
from service.api.playground import PATH as PLAYGROUND_PATH
from service.api.playground import playground_routes
from service.api.schemas import PRIVATE_HEADERS
from service.api.submissions import SubmissionReceiver
from service.api.uploads import refuse_content_encoding
from service.container import Container
from service.domain.errors import Unauthenticated
from service.domain.tenants import Tenant
from service.telemetry.metrics import Port, preregister

_ADMIN_BODY_BYTES = 1_000_000
_SERVER_ERRORS = (500, 502, 503, 504)
_PROBLEMS_LINK = Link("docs/problems", "Problems")


def create_app(container: Container) -> RequestMiddleware:
    return _add_middleware(tenants_app(container), container, Port.TENANTS)


def create_ops_app(container: Container) -> RequestMiddleware:
    return _add_middleware(operators_app(container), container, Port.OPERATORS)


def _add_middleware(app: Litestar, container: Container, port: Port) -> RequestMiddleware:
    methods = {
        route.path_format: route.methods
        for route in app.routes
        if isinstance(route, HTTPRoute) and not route.path.startswith(openapi.UNSERVED_PATH)
    }
    for path, names in methods.items():  # so that their errors are counted from zero
        preregister(container.metrics.http_requests, [port], names, [path], _SERVER_ERRORS)
    return RequestMiddleware(
        HeadMiddleware(app, methods),
        metrics=container.metrics,
        logger=container.logger,
        port=port,
        tracer=container.tracer,
        trusted_proxies=container.trusted_proxies,
    )


def tenants_app(container: Container) -> Litestar:
    """Create the tenants' application without middleware."""

    @get("/", include_in_schema=False)
    async def root() -> Redirect:
        return Redirect("/docs")

    auth = container.tenant_auth
    failures = FailureLimiter(container.metrics.authentication_failures.labels(Port.TENANTS))

    async def tenant(request: Request[Any, Any, Any]) -> Tenant:
        try:
            return auth.authenticate_read(request) if request.method == "GET" else auth.authenticate(request)
        except Unauthenticated:
            await failures.delay(request)
            raise

    receiver = SubmissionReceiver(
        tenant_auth=auth,
        submitter=container.submitter,
        uploads=container.uploads,
        catalogue=container.catalogue,
        fetch_image=container.fetch_image,
        fetches=container.image_fetches,
    )
    task_routes = tasks.task_routes(
        tenant_auth=auth,
        receiver=receiver,
        reader=container.task_reader,
        catalogue=container.catalogue,
        estimator=container.task_cache.durations,
    )
    artifact_routes = artifacts.artifact_routes(container.task_reader, auth)
    event_routes = tasks.event_routes(reader=container.task_reader, tenant_auth=auth)
    usage_routes = [*usage.usage_routes(container.usage), *usage.submission_routes(container.submissions)]
    v1 = Router(
        "/v1",
        route_handlers=[
            Router("/", route_handlers=[*task_routes, *event_routes, *artifact_routes], tags=["Tasks"]),
            Router("/", route_handlers=usage.quota_routes(container.quota), tags=["Quota"]),
            Router("/", route_handlers=usage_routes, tags=["Usage"], middleware=[CompressionMiddleware]),
        ],
        dependencies={"tenant": Provide(tenant)},
        response_headers=[ResponseHeader(name=name, value=value) for name, value in PRIVATE_HEADERS.items()],
    )
    old = Router(
        "/api",
        route_handlers=legacy.legacy_routes(
            tenant_auth=auth,
            failures=failures,
            submitter=container.submitter,
            reader=container.task_reader,
            quota=container.quota,
            uploads=container.uploads,
            catalogue=container.catalogue,
        ),
        tags=["Old clients"],
        security=[{}],
    )
    health = Router("/", route_handlers=health_routes(container.health), tags=["Service"], security=[{}])
    links = [Link("docs", "API"), Link("docs/first-task", "Guides"), _PROBLEMS_LINK]
    playground: Sequence[HTTPRouteHandler] = []
    if container.has_playground:
        links.append(Link(PLAYGROUND_PATH, "Playground"))
        playground = playground_routes(links)
    cards = render_cards(GUIDE_NAMES, PLAYGROUND_PATH if container.has_playground else None)
    guides = guide_assets(GUIDE_NAMES, container.limits, container.catalogue, links)
    pages = [*docs_routes(Site(links, cards, guides)), *playground]
    return _create_litestar(container, [v1, old, health, root, _pages_router(pages)], tenants_config())


def operators_app(container: Container) -> Litestar:
    """Create the operators' application without middleware: in a worker only health and metrics."""
    health = Router("/", route_handlers=health_routes(container.health), tags=["Service"], security=[{}])
    failures = FailureLimiter(container.metrics.authentication_failures.labels(Port.OPERATORS))
    guards = [metrics_guard(container.metrics_token, failures)] if container.metrics_token else []
    metrics = metrics_route(container.metrics, container.ledger_snapshot, guards)
    if (admin_auth := container.admin_auth) is None:
        return _create_litestar(container, [health, metrics], operators_config())

    # Litestar would run a function in a thread, where it can't name the operator for the log.
    async def guard(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        try:
            admin_auth.authenticate(connection)
        except Unauthenticated:
            await failures.delay(connection)
            raise
        refuse_content_encoding(connection.headers)

    registry_routes = [
        *admin.resource_routes(registry_admin=container.registry_admin, quota=container.quota),
        *registry.registry_routes(container.registry_admin),
    ]
    usage_routes = [
        *usage.operator_usage_routes(container.usage),
        *usage.operator_submission_routes(container.submissions),
    ]
    webhook_routes = admin.webhook_routes(container.webhook_admin)
    admin_routes = Router(
        "/admin/v1",
        route_handlers=[
            Router("/", route_handlers=registry_routes, tags=["Registry"]),
            Router("/", route_handlers=tasks.operator_task_routes(container.submissions), tags=["Tasks"]),
            Router("/", route_handlers=usage_routes, tags=["Usage"]),
            Router("/", route_handlers=webhook_routes, tags=["Webhooks"]),
            Router("/", route_handlers=admin.clock_routes(container.registry_admin), tags=["Service"]),
        ],
        guards=[guard, check_query],
        middleware=[CompressionMiddleware],
        request_class=JsonRequest,
        # Responses show the present state, and one of them a token.
        cache_control=CacheControlHeader(no_store=True),
    )
    links = [Link("docs", "API"), Link("docs/operating", "Guide"), _PROBLEMS_LINK]
    guides = guide_assets(OPERATOR_GUIDE_NAMES, container.limits, container.catalogue, links)
    pages = docs_routes(Site(links, render_cards(OPERATOR_GUIDE_NAMES), guides))
    return _create_litestar(container, [admin_routes, health, metrics, _pages_router(pages)], operators_config())


def _pages_router(routes: Sequence[HTTPRouteHandler]) -> Router:
    return Router("/", route_handlers=routes, middleware=[static_compression])


class _Litestar(Litestar):
    """Litestar without support of pydantic and attrs, which it would load wherever they are installed: 9 MB."""

    @staticmethod
    def _get_default_plugins(plugins: list[PluginProtocol]) -> list[PluginProtocol]:
        return [*plugins, MsgspecDIPlugin()]


def _create_litestar(
    container: Container, handlers: Sequence[ControllerRouterHandler], config: OpenAPIConfig
) -> Litestar:
    return _Litestar(
        handlers,
        openapi_config=config,
        exception_handlers=exception_handlers(container.logger),
        request_max_body_size=_ADMIN_BODY_BYTES,
        logging_config=None,
        pdb_on_exception=False,
    )
