"""Routes for accounts, tenants, tokens, webhooks, the registry and the clock."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, delete, get, post, put
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath, HeaderParameter, JSONBody, PathParameter, QueryParameter

from service.api import openapi
from service.api.admin_schemas import (
    AccountBody,
    AccountList,
    AccountView,
    AppliedView,
    ClockResetView,
    DeliveryList,
    DeliveryView,
    DifferenceKind,
    DifferenceView,
    NewSecretView,
    NewTokenView,
    RegistryBody,
    ResealedView,
    TenantBody,
    TenantList,
    TenantView,
    TokenBody,
    account_view,
    applied_view,
    delivery_view,
    expiry,
    new_secret_view,
    registry_body,
    resealed_view,
    tenant_view,
)
from service.domain.errors import FieldError, InvalidOptions, dotted
from service.domain.tenants import NAME_MUST, Account, Tenant, without_query
from service.usecases.admin import Operators, Reseal, Webhooks
from service.usecases.registry_apply import Apply, Plan
from service.usecases.reports import Quota

_NAME = r"\A[a-z0-9][a-z0-9._-]{0,62}\Z"


NewName = Annotated[str, PathParameter(schema_extra={"pattern": _NAME}, description="A name of your choice.")]


Name = Annotated[str, PathParameter(description="The name.")]


ForceDelete = Annotated[bool, QueryParameter(description="Even though tasks run or others refer to it.")]


TokenGrace = Annotated[float, QueryParameter(ge=0, le=31_536_000, description="Seconds for which it stays valid yet.")]


_CHANGE = ("invalid-options", "ledger-unavailable", "overloaded")


def resource_routes(*, operators: Operators, quota: Quota) -> Sequence[HTTPRouteHandler]:
    """The handlers under `/admin/v1` for accounts, tenants and tokens."""
    return [*_account_routes(operators), *_tenant_routes(operators, quota), *_token_routes(operators)]


def _account_routes(operators: Operators) -> Sequence[HTTPRouteHandler]:
    async def view(account: Account) -> AccountView:
        return account_view(account, (await operators.balances((account,)))[account.id])

    @put(
        "/accounts/{name:str}",
        operation_id="put-account",
        summary="Make or replace an account",
        responses=openapi.problems(401, "malformed-request", *_CHANGE),
    )
    async def put_account(name: NewName, data: JSONBody[AccountBody]) -> AccountView:
        return await view(await operators.put_account(_fit(name), data.key(), data.url(), data.policy()))

    @get(
        "/accounts",
        operation_id="list-accounts",
        summary="List the accounts",
        responses=openapi.problems(401, "ledger-unavailable"),
    )
    async def list_accounts() -> AccountList:
        accounts = await operators.accounts()
        states = await operators.balances(accounts)
        return AccountList([account_view(each, states[each.id]) for each in accounts])

    @get(
        "/accounts/{name:str}",
        operation_id="read-account",
        summary="Read an account: balance, state, what is under way",
        responses=openapi.problems(401, 404, "ledger-unavailable"),
    )
    async def read_account(name: Name) -> AccountView:
        return await view(await operators.account(name))

    @delete(
        "/accounts/{name:str}",
        operation_id="delete-account",
        summary="Delete an account",
        responses=openapi.problems(401, 404, "conflict", *_CHANGE),
    )
    async def delete_account(name: Name, force: ForceDelete = False) -> None:
        await operators.delete_account(name, force=force)

    @post(
        "/accounts/{name:str}/reopen",
        operation_id="reopen-account",
        summary="Look at an exhausted or invalid account again now",
        responses=openapi.problems(401, 404, "ledger-unavailable"),
        status_code=200,
    )
    async def reopen(name: Name) -> AccountView:
        return await view(await operators.reopen(name))

    return [put_account, list_accounts, read_account, delete_account, reopen]


def _tenant_routes(operators: Operators, quota: Quota) -> Sequence[HTTPRouteHandler]:
    async def view(tenant: Tenant, secret: str | None = None) -> TenantView:
        return tenant_view(tenant, operators.tokens(tenant), await quota.report(tenant), secret)

    @put(
        "/tenants/{name:str}",
        operation_id="put-tenant",
        summary="Make or replace a tenant",
        responses=openapi.problems(401, "malformed-request", *_CHANGE),
    )
    async def put_tenant(name: NewName, data: JSONBody[TenantBody]) -> TenantView:
        put = await operators.put_tenant(data.tenant(_fit(name)), data.webhook.secret if data.webhook else None)
        return await view(put.tenant, put.secret)

    @get(
        "/tenants",
        operation_id="list-tenants",
        summary="List the tenants",
        responses=openapi.problems(401, "ledger-unavailable"),
    )
    async def list_tenants() -> TenantList:
        return TenantList([await view(tenant) for tenant in await operators.tenants()])

    @get(
        "/tenants/{name:str}",
        operation_id="read-tenant",
        summary="Read a tenant: policies, use, tokens",
        responses=openapi.problems(401, 404, "ledger-unavailable"),
    )
    async def read_tenant(name: Name) -> TenantView:
        return await view(await operators.tenant(name))

    @delete(
        "/tenants/{name:str}",
        operation_id="delete-tenant",
        summary="Delete a tenant and its tokens",
        responses=openapi.problems(401, 404, "conflict", *_CHANGE),
    )
    async def delete_tenant(name: Name, force: ForceDelete = False) -> None:
        await operators.delete_tenant(name, force=force)

    return [put_tenant, list_tenants, read_tenant, delete_tenant]


def _token_routes(operators: Operators) -> Sequence[HTTPRouteHandler]:
    @post(
        "/tenants/{name:str}/tokens",
        operation_id="create-token",
        summary="Make a token for a tenant, shown once",
        responses=openapi.problems(401, 404, "malformed-request", *_CHANGE),
    )
    async def create_token(name: Name, data: JSONBody[TokenBody | None] = None) -> NewTokenView:
        body = data or TokenBody()
        made = await operators.create_token(name, body.label, body.expires(operators.now()))
        return NewTokenView(made.token.id, made.text, expiry(made.token))

    @delete(
        "/tenants/{name:str}/tokens/{token_id:str}",
        operation_id="revoke-token",
        summary="Revoke a token, at once or after a grace",
        responses=openapi.problems(401, 404, *_CHANGE),
    )
    async def revoke_token(name: Name, token_id: FromPath[str], grace: TokenGrace = 0) -> None:
        await operators.revoke_token(name, token_id, grace)

    return [create_token, revoke_token]


def _fit(name: str) -> str:
    """A name that may be given to something new. Raises InvalidOptions."""
    if not re.search(_NAME, name):
        raise InvalidOptions([FieldError("name", f"must {NAME_MUST}")])
    return name


_KEY, _SECRET, _ADDRESS = ("user_key", "value"), ("webhook", "secret", "value"), ("webhook", "url")


def differences(plan: Plan, now: float) -> list[DifferenceView]:
    """What a plan changes, at a time in seconds since the epoch; of secrets only that they change."""
    before, after = (_plain(registry_body(each, now), plan.fresh) for each in (plan.before, plan.after))
    rekeyed, resigned = plan.rekeyed & plan.before.accounts.keys(), plan.resigned & plan.before.tenants.keys()
    found = [
        *_between(before, after),
        *(DifferenceView(dotted("accounts", name, *_KEY), DifferenceKind.CHANGED) for name in rekeyed),
        *(DifferenceView(dotted("tenants", name, *_SECRET), DifferenceKind.CHANGED) for name in resigned),
        *(DifferenceView(dotted("tenants", name, *_SECRET), DifferenceKind.ADDED) for name in plan.made),
    ]
    return sorted(found, key=lambda each: each.path)


def _plain(body: RegistryBody, fresh: Collection[int]) -> dict[str, Any]:
    """The registry as plain values, without ids that nobody asked for: a dry run can't know what they will be."""
    plain: dict[str, Any] = {"accounts": {}, "tenants": {}} | msgspec.to_builtins(body)
    for owners in plain.values():
        for owner in owners.values():
            if owner["id"] in fresh:
                del owner["id"]
    return plain


def _between(before: Mapping[str, Any], after: Mapping[str, Any], *path: str) -> Iterator[DifferenceView]:
    for key in sorted({*before, *after}):
        old, new, where = before.get(key), after.get(key), (*path, key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _between(old, new, *where)
        elif key not in before:
            yield DifferenceView(dotted(*where), DifferenceKind.ADDED, after=_shown(new, *where))
        elif key not in after:
            yield DifferenceView(dotted(*where), DifferenceKind.REMOVED, before=_shown(old, *where))
        elif old != new:
            yield DifferenceView(dotted(*where), DifferenceKind.CHANGED, _shown(old, *where), _shown(new, *where))


def _shown(value: Any, *path: str) -> Any:
    """A value as it may stand in the log of whatever applies a registry: of a webhook the address without its query."""
    if isinstance(value, dict):
        return {key: _shown(each, *path, key) for key, each in value.items()}
    if path[-2:] == _ADDRESS and value is not None and without_query(value) != value:
        return f"{without_query(value)}?…"
    return value


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


_MOST_LISTED = 1_000


SecretGrace = Annotated[
    float, QueryParameter(ge=0, le=31_536_000, description="Seconds for which the secret before signs too.")
]


Id = Annotated[str, PathParameter(description="The `id` of the delivery, which its receiver sees as `webhook-id`.")]


Most = Annotated[int, QueryParameter(ge=1, le=_MOST_LISTED, description="How many at the most.")]


def webhook_routes(webhooks: Webhooks) -> Sequence[HTTPRouteHandler]:
    """The handlers under `/admin/v1` for webhooks."""

    @post(
        "/tenants/{name:str}/webhook-secret",
        operation_id="rotate-webhook-secret",
        summary="Make a new webhook secret for a tenant, shown once",
        description="Each webhook carries a signature of both secrets during the grace, so that its receiver can move "
        "over in between.",
        responses=openapi.problems(401, 404, "conflict", "invalid-options", "ledger-unavailable", "overloaded"),
    )
    async def rotate(name: Name, grace: SecretGrace = 0) -> NewSecretView:
        return new_secret_view(await webhooks.rotate(name, grace))

    @get(
        "/webhooks/failed",
        operation_id="list-failed-webhooks",
        summary="List the webhooks that could not be delivered, newest first",
        description="They are kept for 30 days.",
        responses=openapi.problems(401, "invalid-options", "ledger-unavailable"),
    )
    async def failed(limit: Most = 100) -> DeliveryList:
        return DeliveryList([delivery_view(each) for each in await webhooks.failed(limit)])

    @post(
        "/webhooks/{delivery_id:str}/redeliver",
        operation_id="redeliver-webhook",
        summary="Send a webhook again, from the start",
        description="Also one that was delivered in the last three days.",
        responses=openapi.problems(401, 404, "ledger-unavailable"),
        status_code=200,
    )
    async def redeliver(delivery_id: Id) -> DeliveryView:
        return delivery_view(await webhooks.redeliver(delivery_id))

    return [rotate, failed, redeliver]


def clock_routes(operators: Operators) -> Sequence[HTTPRouteHandler]:
    """The handler under `/admin/v1/clock`."""

    @post(
        "/clock/reset",
        operation_id="reset-clock",
        summary="Set the ledger's time back to the clock of Redis",
        description=(
            "After the clock of Redis has stepped back, the ledger's time is ahead of it until it has made that good, "
            "ten times as slowly. This ends that at once: the offset becomes 0, and leases, checks, deliveries and "
            "probes become due earlier by as much."
        ),
        response_description="How far it was ahead",
        responses=openapi.problems(401, "ledger-unavailable"),
        status_code=200,
    )
    async def reset(request: Request[Any, Any, Any]) -> ClockResetView:
        address = request.client.host if request.client else "unknown"
        return ClockResetView(await operators.reset_clock(f"operator at {address}") / 1000)

    return [reset]
