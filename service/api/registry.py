"""The operators' calls for the registry as a whole, so that it can be kept in a file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from litestar import Response, get, post, put
from litestar.handlers import HTTPRouteHandler
from litestar.params import HeaderParameter, JSONBody, QueryParameter

from service.api import openapi
from service.api.differences import differences
from service.api.registry_views import (
    AppliedView,
    RegistryBody,
    ResealedView,
    applied_view,
    registry_body,
    resealed_view,
)
from service.usecases.admin import Reseal
from service.usecases.registry_apply import Apply

_LARGEST_BODY = 32_000_000

_ANY = "*"

ForceApply = Annotated[bool, QueryParameter(description="Remove even what has tasks running, and even all there is.")]
Prune = Annotated[bool, QueryParameter(description="Remove the accounts, tenants and tokens that are not sent.")]
DryRun = Annotated[bool, QueryParameter(description="Change nothing, only say what would be different.")]
IfMatch = Annotated[
    str | None,
    HeaderParameter(name="If-Match", description="The `ETag` of what you have read: what is newer is not overwritten."),
]


def registry_routes(apply: Apply, reseal: Reseal) -> Sequence[HTTPRouteHandler]:
    """The handlers under `/admin/v1` for the registry as a whole."""

    @get(
        "/registry",
        operation_id="read-registry",
        summary="Read the whole registry, to keep it in a file",
        description="With the hashes of tokens and with where secrets are, without secrets.",
        response_headers=openapi.headers("ETag"),
        responses=openapi.problems(401, "ledger-unavailable"),
    )
    async def read_registry() -> Response[RegistryBody]:
        current = await apply.current()
        return Response(registry_body(current, apply.now()), headers={"ETag": _etag(current.version)})

    @put(
        "/registry",
        operation_id="put-registry",
        summary="Make the registry what is sent, all of it or nothing",
        description="What is sent replaces what has its name: what is left out of it gets its default, only ids and "
        "secrets are kept. What is not sent stays, unless `prune` says otherwise. Sent again it changes nothing.",
        response_headers=openapi.headers("ETag"),
        responses=openapi.problems(
            401, "malformed-request", "conflict", "outdated", "invalid-options", "ledger-unavailable", "overloaded"
        ),
        request_max_body_size=_LARGEST_BODY,
    )
    async def put_registry(
        data: JSONBody[RegistryBody],
        known: IfMatch = None,
        dry_run: DryRun = False,
        prune: Prune = False,
        force: ForceApply = False,
    ) -> Response[AppliedView]:
        wanted = data.wanted(prune=prune)
        plan = await apply(wanted, force=force, dry_run=dry_run, fits=partial(_fits, known))
        view = applied_view(plan, differences(plan, apply.now()), dry_run=dry_run)
        version = plan.after.version if view.applied else plan.before.version
        return Response(view, headers={"ETag": _etag(version)})

    @post(
        "/registry/reseal",
        operation_id="reseal-registry",
        summary="Seal all secrets with the first of the secret keys",
        description="So that the others can be taken away. Every process has to know the first one by then. The "
        "secrets stay what they are; called again it changes nothing.",
        responses=openapi.problems(401, "ledger-unavailable", "overloaded"),
        status_code=200,
    )
    async def reseal_registry() -> ResealedView:
        return resealed_view(await reseal())

    return [read_registry, put_registry, reseal_registry]


def _etag(version: int) -> str:
    return f'"{version}"'


def _fits(header: str | None, version: int) -> bool:
    """Whether If-Match names a version; without it every one will do."""
    tags = [each.strip() for each in (header or _ANY).split(",")]
    return _ANY in tags or _etag(version) in tags
