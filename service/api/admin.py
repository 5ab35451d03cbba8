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
    Account,
    AccountBody,
    AccountList,
    ApplyResult,
    ClockReset,
    Delivery,
    DeliveryList,
    Difference,
    DifferenceKind,
    NewSecret,
    NewToken,
    ReencryptResult,
    RegistryBody,
    Tenant,
    TenantBody,
    TenantList,
    TokenBody,
    render_account,
    render_apply_result,
    render_delivery,
    render_new_secret,
    render_reencrypt_result,
    render_registry,
    render_tenant,
    token_expires_at,
)
from service.domain import tenants
from service.domain.errors import FieldError, InvalidOptions, field_path
from service.domain.tenants import NAME_RULE, strip_query
from service.usecases.admin import RegistryAdmin, SecretReencryption, WebhookAdmin
from service.usecases.registry_apply import RegistryApply, RegistryPlan
from service.usecases.reports import QuotaReports

_NAME_PATTERN = r"\A[a-z0-9][a-z0-9._-]{0,62}\Z"
NewName = Annotated[str, PathParameter(schema_extra={"pattern": _NAME_PATTERN}, description="A name of your choice.")]
TenantName = Annotated[str, PathParameter(description="The name.")]
ForceDelete = Annotated[bool, QueryParameter(description="Even though tasks run or others refer to it.")]
TokenGrace = Annotated[float, QueryParameter(ge=0, le=31_536_000, description="Seconds for which it stays valid yet.")]
_CHANGE_PROBLEMS = ("invalid-options", "ledger-unavailable", "overloaded")


def resource_routes(*, registry_admin: RegistryAdmin, quota: QuotaReports) -> Sequence[HTTPRouteHandler]:
    """The handlers under `/admin/v1` for accounts, tenants and tokens."""
    return [*_account_routes(registry_admin), *_tenant_routes(registry_admin, quota), *_token_routes(registry_admin)]


def _account_routes(registry_admin: RegistryAdmin) -> Sequence[HTTPRouteHandler]:
    async def view(account: tenants.Account) -> Account:
        return render_account(account, (await registry_admin.account_states((account,)))[account.id])

    @put(
        "/accounts/{name:str}",
        operation_id="put-account",
        summary="Make or replace an account",
        responses=openapi.problem_responses(401, "malformed-request", *_CHANGE_PROBLEMS),
    )
    async def put_account(name: NewName, data: JSONBody[AccountBody]) -> Account:
        return await view(
            await registry_admin.put_account(
                validate_name(name), data.checked_user_key(), data.checked_base_url(), data.to_policy()
            )
        )

    @get(
        "/accounts",
        operation_id="list-accounts",
        summary="List the accounts",
        responses=openapi.problem_responses(401, "ledger-unavailable"),
    )
    async def list_accounts() -> AccountList:
        accounts = await registry_admin.list_accounts()
        states = await registry_admin.account_states(accounts)
        return AccountList([render_account(account, states[account.id]) for account in accounts])

    @get(
        "/accounts/{name:str}",
        operation_id="read-account",
        summary="Read an account: balance, state, what is under way",
        responses=openapi.problem_responses(401, 404, "ledger-unavailable"),
    )
    async def read_account(name: TenantName) -> Account:
        return await view(await registry_admin.get_account(name))

    @delete(
        "/accounts/{name:str}",
        operation_id="delete-account",
        summary="Delete an account",
        responses=openapi.problem_responses(401, 404, "conflict", *_CHANGE_PROBLEMS),
    )
    async def delete_account(name: TenantName, force: ForceDelete = False) -> None:
        await registry_admin.delete_account(name, force=force)

    @post(
        "/accounts/{name:str}/reopen",
        operation_id="reopen-account",
        summary="Look at an exhausted or invalid account again now",
        responses=openapi.problem_responses(401, 404, "ledger-unavailable"),
        status_code=200,
    )
    async def reopen(name: TenantName) -> Account:
        return await view(await registry_admin.reopen_account(name))

    return [put_account, list_accounts, read_account, delete_account, reopen]


def _tenant_routes(registry_admin: RegistryAdmin, quota: QuotaReports) -> Sequence[HTTPRouteHandler]:
    async def view(tenant: tenants.Tenant, secret: str | None = None) -> Tenant:
        return render_tenant(tenant, registry_admin.list_tokens(tenant), await quota.for_tenant(tenant), secret)

    @put(
        "/tenants/{name:str}",
        operation_id="put-tenant",
        summary="Make or replace a tenant",
        responses=openapi.problem_responses(401, "malformed-request", *_CHANGE_PROBLEMS),
    )
    async def put_tenant(name: NewName, data: JSONBody[TenantBody]) -> Tenant:
        put = await registry_admin.put_tenant(
            data.to_tenant(validate_name(name)), data.webhook.secret if data.webhook else None
        )
        return await view(put.tenant, put.generated_secret)

    @get(
        "/tenants",
        operation_id="list-tenants",
        summary="List the tenants",
        responses=openapi.problem_responses(401, "ledger-unavailable"),
    )
    async def list_tenants() -> TenantList:
        return TenantList([await view(tenant) for tenant in await registry_admin.list_tenants()])

    @get(
        "/tenants/{name:str}",
        operation_id="read-tenant",
        summary="Read a tenant: policies, use, tokens",
        responses=openapi.problem_responses(401, 404, "ledger-unavailable"),
    )
    async def read_tenant(name: TenantName) -> Tenant:
        return await view(await registry_admin.get_tenant(name))

    @delete(
        "/tenants/{name:str}",
        operation_id="delete-tenant",
        summary="Delete a tenant and its tokens",
        responses=openapi.problem_responses(401, 404, "conflict", *_CHANGE_PROBLEMS),
    )
    async def delete_tenant(name: TenantName, force: ForceDelete = False) -> None:
        await registry_admin.delete_tenant(name, force=force)

    return [put_tenant, list_tenants, read_tenant, delete_tenant]


def _token_routes(registry_admin: RegistryAdmin) -> Sequence[HTTPRouteHandler]:
    @post(
        "/tenants/{name:str}/tokens",
        operation_id="create-token",
        summary="Make a token for a tenant, shown once",
        responses=openapi.problem_responses(401, 404, "malformed-request", *_CHANGE_PROBLEMS),
    )
    async def create_token(name: TenantName, data: JSONBody[TokenBody | None] = None) -> NewToken:
        body = data or TokenBody()
        made = await registry_admin.create_token(name, body.label, body.checked_expires_at(registry_admin.now()))
        return NewToken(made.token.id, made.text, token_expires_at(made.token))

    @delete(
        "/tenants/{name:str}/tokens/{token_id:str}",
        operation_id="revoke-token",
        summary="Revoke a token, at once or after a grace",
        responses=openapi.problem_responses(401, 404, *_CHANGE_PROBLEMS),
    )
    async def revoke_token(name: TenantName, token_id: FromPath[str], grace: TokenGrace = 0) -> None:
        await registry_admin.revoke_token(name, token_id, grace)

    return [create_token, revoke_token]


def validate_name(name: str) -> str:
    """A name that may be given to something new. Raises InvalidOptions."""
    if not re.search(_NAME_PATTERN, name):
        raise InvalidOptions([FieldError("name", f"must {NAME_RULE}")])
    return name


_KEY_PATH, _SECRET_PATH, _URL_PATH = ("user_key", "value"), ("webhook", "secret", "value"), ("webhook", "url")


def diff_registry(plan: RegistryPlan, now: float) -> list[Difference]:
    """What a plan changes, at a time in seconds since the epoch; of secrets only that they change."""
    before, after = (_to_plain(render_registry(item, now), plan.assigned_ids) for item in (plan.before, plan.after))
    rekeyed, resigned = (
        plan.changed_keys & plan.before.accounts.keys(),
        plan.changed_secrets & plan.before.tenants.keys(),
    )
    found = [
        *_diff_mappings(before, after),
        *(Difference(field_path("accounts", name, *_KEY_PATH), DifferenceKind.CHANGED) for name in rekeyed),
        *(Difference(field_path("tenants", name, *_SECRET_PATH), DifferenceKind.CHANGED) for name in resigned),
        *(
            Difference(field_path("tenants", name, *_SECRET_PATH), DifferenceKind.ADDED)
            for name in plan.generated_secrets
        ),
    ]
    return sorted(found, key=lambda item: item.path)


def _to_plain(body: RegistryBody, assigned_ids: Collection[int]) -> dict[str, Any]:
    """The registry as plain values, without ids that nobody asked for: a dry run can't know what they will be."""
    plain: dict[str, Any] = {"accounts": {}, "tenants": {}} | msgspec.to_builtins(body)
    for owners in plain.values():
        for owner in owners.values():
            if owner["id"] in assigned_ids:
                del owner["id"]
    return plain


def _diff_mappings(before: Mapping[str, Any], after: Mapping[str, Any], *path: str) -> Iterator[Difference]:
    for key in sorted({*before, *after}):
        old, new, where = before.get(key), after.get(key), (*path, key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _diff_mappings(old, new, *where)
        elif key not in before:
            yield Difference(field_path(*where), DifferenceKind.ADDED, after=_redact_urls(new, *where))
        elif key not in after:
            yield Difference(field_path(*where), DifferenceKind.REMOVED, before=_redact_urls(old, *where))
        elif old != new:
            yield Difference(
                field_path(*where), DifferenceKind.CHANGED, _redact_urls(old, *where), _redact_urls(new, *where)
            )


def _redact_urls(value: Any, *path: str) -> Any:
    """A value as it may stand in the log of whatever applies a registry: of a webhook the address without its query."""
    if isinstance(value, dict):
        return {key: _redact_urls(item, *path, key) for key, item in value.items()}
    if path[-2:] == _URL_PATH and value is not None and strip_query(value) != value:
        return f"{strip_query(value)}?…"
    return value


_MAX_REGISTRY_BYTES = 32_000_000
_ANY_ETAG = "*"
ForceApply = Annotated[bool, QueryParameter(description="Remove even what has tasks running, and even all there is.")]
Prune = Annotated[bool, QueryParameter(description="Remove the accounts, tenants and tokens that are not sent.")]
DryRun = Annotated[bool, QueryParameter(description="Change nothing, only say what would be different.")]
IfMatch = Annotated[
    str | None,
    HeaderParameter(name="If-Match", description="The `ETag` of what you have read: what is newer is not overwritten."),
]


def registry_routes(registry_apply: RegistryApply, registry_admin: RegistryAdmin) -> Sequence[HTTPRouteHandler]:
    """The handlers under `/admin/v1` for the registry as a whole."""

    @get(
        "/registry",
        operation_id="read-registry",
        summary="Read the whole registry, to keep it in a file",
        description="With the hashes of tokens and with where secrets are, without secrets.",
        response_headers=openapi.response_headers("ETag"),
        responses=openapi.problem_responses(401, "ledger-unavailable"),
    )
    async def read_registry() -> Response[RegistryBody]:
        current = await registry_apply.load_current()
        return Response(
            render_registry(current, registry_apply.now()), headers={"ETag": _registry_etag(current.version)}
        )

    @put(
        "/registry",
        operation_id="put-registry",
        summary="Make the registry what is sent, all of it or nothing",
        description="What is sent replaces what has its name: what is left out of it gets its default, only ids and "
        "secrets are kept. What is not sent stays, unless `prune` says otherwise. Sent again it changes nothing.",
        response_headers=openapi.response_headers("ETag"),
        responses=openapi.problem_responses(
            401, "malformed-request", "conflict", "outdated", "invalid-options", "ledger-unavailable", "overloaded"
        ),
        request_max_body_size=_MAX_REGISTRY_BYTES,
    )
    async def put_registry(
        data: JSONBody[RegistryBody],
        known: IfMatch = None,
        dry_run: DryRun = False,
        prune: Prune = False,
        force: ForceApply = False,
    ) -> Response[ApplyResult]:
        wanted = data.to_desired(prune=prune)
        plan = await registry_apply.apply(
            wanted, force=force, dry_run=dry_run, version_matches=partial(etag_matches, known)
        )
        view = render_apply_result(plan, diff_registry(plan, registry_apply.now()), dry_run=dry_run)
        version = plan.after.version if view.applied else plan.before.version
        return Response(view, headers={"ETag": _registry_etag(version)})

    @post(
        "/registry/reseal",
        operation_id="reseal-registry",
        summary="Seal all secrets with the first of the secret keys",
        description="So that the others can be taken away. Every process has to know the first one by then. The "
        "secrets stay what they are; called again it changes nothing.",
        responses=openapi.problem_responses(401, "ledger-unavailable", "overloaded"),
        status_code=200,
    )
    async def reseal_registry() -> ReencryptResult:
        return render_reencrypt_result(await registry_admin.reencrypt_secrets())

    return [read_registry, put_registry, reseal_registry]


def _registry_etag(version: int) -> str:
    return f'"{version}"'


def etag_matches(header: str | None, version: int) -> bool:
    """Whether If-Match names a version; without it every one will do."""
    tags = [part.strip() for part in (header or _ANY_ETAG).split(",")]
    return _ANY_ETAG in tags or _registry_etag(version) in tags


_MAX_LISTED = 1_000
SecretGrace = Annotated[
    float, QueryParameter(ge=0, le=31_536_000, description="Seconds for which the secret before signs too.")
]
DeliveryId = Annotated[
    str, PathParameter(description="The `id` of the delivery, which its receiver sees as `webhook-id`.")
]
MaxListed = Annotated[int, QueryParameter(ge=1, le=_MAX_LISTED, description="How many at the most.")]


def webhook_routes(webhooks: WebhookAdmin) -> Sequence[HTTPRouteHandler]:
    """The handlers under `/admin/v1` for webhooks."""

    @post(
        "/tenants/{name:str}/webhook-secret",
        operation_id="rotate-webhook-secret",
        summary="Make a new webhook secret for a tenant, shown once",
        description="Each webhook carries a signature of both secrets during the grace, so that its receiver can move "
        "over in between.",
        responses=openapi.problem_responses(
            401, 404, "conflict", "invalid-options", "ledger-unavailable", "overloaded"
        ),
    )
    async def rotate(name: TenantName, grace: SecretGrace = 0) -> NewSecret:
        return render_new_secret(await webhooks.rotate_secret(name, grace))

    @get(
        "/webhooks/failed",
        operation_id="list-failed-webhooks",
        summary="List the webhooks that could not be delivered, newest first",
        description="They are kept for 30 days.",
        responses=openapi.problem_responses(401, "invalid-options", "ledger-unavailable"),
    )
    async def failed(limit: MaxListed = 100) -> DeliveryList:
        return DeliveryList([render_delivery(item) for item in await webhooks.list_failed(limit)])

    @post(
        "/webhooks/{delivery_id:str}/redeliver",
        operation_id="redeliver-webhook",
        summary="Send a webhook again, from the start",
        description="Also one that was delivered in the last three days.",
        responses=openapi.problem_responses(401, 404, "ledger-unavailable"),
        status_code=200,
    )
    async def redeliver(delivery_id: DeliveryId) -> Delivery:
        return render_delivery(await webhooks.redeliver(delivery_id))

    return [rotate, failed, redeliver]


def clock_routes(registry_admin: RegistryAdmin) -> Sequence[HTTPRouteHandler]:
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
        responses=openapi.problem_responses(401, "ledger-unavailable"),
        status_code=200,
    )
    async def reset(request: Request[Any, Any, Any]) -> ClockReset:
        address = request.client.host if request.client else "unknown"
        return ClockReset(await registry_admin.reset_clock(f"operator at {address}") / 1000)

    return [reset]
