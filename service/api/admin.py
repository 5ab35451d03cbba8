"""Routes for accounts, tenants, tokens, webhooks and the clock."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from litestar import Response, delete, get, patch, post, put
from litestar.enums import RequestEncodingType
from litestar.handlers import HTTPRouteHandler
from litestar.params import BodyKwarg, FromPath, HeaderParameter, JSONBody, PathParameter, QueryParameter
from msgspec.structs import replace

from service.api import admin_schemas as schemas
from service.api import openapi
from service.api.errors import find_body_errors
from service.api.params import JsonRequest
from service.domain import tenants
from service.domain.errors import ErrorCollector, FieldError, InvalidOptions, VersionConflict
from service.domain.tenants import NAME_RULE
from service.usecases.admin import RegistryAdmin, require
from service.usecases.background import run_in_turns
from service.usecases.registry_plan import DesiredAccount, DesiredTenant
from service.usecases.reports import PolicyReport, QuotaReports
from service.usecases.webhook_delivery import WebhookAdmin

_NAME_PATTERN = r"\A[a-z0-9][a-z0-9._-]{0,62}\Z"
NewName = Annotated[str, PathParameter(schema_extra={"pattern": _NAME_PATTERN}, description="A name of your choice.")]
TenantName = Annotated[str, PathParameter(description="The name.")]
ForceDelete = Annotated[bool, QueryParameter(description="Even if tasks run or other entries refer to it.")]
TokenGrace = Annotated[float, QueryParameter(ge=0, le=31_536_000, description="Seconds for which it stays valid.")]
_PUT_DESCRIPTION = "Omitted fields get their defaults, only secrets are kept. Its `id` stays the same."
_PATCH_DESCRIPTION = "Changes the fields that are in the body, and keeps the others."
CHANGE_PROBLEMS = ("forbidden", "ledger-unavailable", "overloaded")


class TenantRequest(JsonRequest):
    """A request with tenants, in which the fields of former versions are accepted."""

    async def json(self) -> Any:
        body = await super().json()
        errors = ErrorCollector()
        schemas.rename_old_fields(body, errors)
        errors.raise_if_any()
        return body


IfMatch = Annotated[
    str | None,
    HeaderParameter(name="If-Match", description="The `ETag` you have read; a newer version is not overwritten."),
]
IfNoneMatch = Annotated[
    str | None, HeaderParameter(name="If-None-Match", description="`*`: only if there is none of this name.")
]
MergePatch = Annotated[
    dict[str, Any],
    BodyKwarg(
        media_type=RequestEncodingType.JSON,
        description="The fields to change (RFC 7396): `null` is the default, and an array is replaced as a whole.",
    ),
]
_ANY_ETAG = "*"
_Entry = tenants.Account | tenants.Tenant
_Body = TypeVar("_Body", schemas.AccountBody, schemas.TenantBody)


def _entry_etag(entry: _Entry) -> str:
    return f'"{hashlib.sha256(msgspec.msgpack.encode(entry)).hexdigest()[:32]}"'


def etag_matches(header: str | None, etag: str | None) -> bool:
    """Return whether a list of tags contains this one; `*` is any, and None that of a missing entry."""
    tags = [tag.strip() for tag in (header or "").split(",")]
    return etag is not None and (_ANY_ETAG in tags or etag in tags)


def _check_preconditions(entry: _Entry | None, if_match: str | None, if_none_match: str | None = None) -> None:
    etag = _entry_etag(entry) if entry else None
    if if_match is not None and not etag_matches(if_match, etag):
        raise VersionConflict("It was changed since you read it. Read it again, and compare.")
    if entry and etag_matches(if_none_match, etag):
        raise VersionConflict(f"{entry.name} exists already.")


def _apply_patch(
    body_type: type[_Body], spec: schemas.AccountSpec | schemas.TenantSpec, patch: Mapping[str, Any]
) -> _Body:
    """Return a body with the settings changed by a merge patch. Raises InvalidOptions."""
    body = _merge(msgspec.to_builtins(spec), patch)
    if errors := find_body_errors(body, body_type):
        raise InvalidOptions(errors)
    return msgspec.convert(body, body_type)


def _patch_tenant(tenant: tenants.Tenant, patch: Mapping[str, Any]) -> DesiredTenant:
    """Return the patched tenant; disabled URLs are enabled by a patch of its webhook. Raises InvalidOptions.

    A webhook that is not in the patch stays as it is, also if it would not be accepted any more.
    """
    spec = schemas.tenant_spec(tenant)
    if "webhook" in patch:
        return _apply_patch(schemas.TenantBody, spec, patch).to_desired(tenant.name)
    desired = _apply_patch(schemas.TenantBody, replace(spec, webhook=None), patch).to_desired(tenant.name)
    return replace(desired, tenant=replace(desired.tenant, webhook=tenant.webhook))


def _merge(target: Any, patch: Any) -> Any:
    """Apply a JSON merge patch (RFC 7396)."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(merged.get(key), value)
    return merged


def resource_routes(*, registry_admin: RegistryAdmin, quota: QuotaReports) -> Sequence[HTTPRouteHandler]:
    return [*_account_routes(registry_admin), *_tenant_routes(registry_admin, quota), *_token_routes(registry_admin)]


def _account_routes(registry_admin: RegistryAdmin) -> Sequence[HTTPRouteHandler]:
    async def render(account: tenants.Account) -> Response[schemas.Account]:
        states = await registry_admin.account_states((account,))
        return Response(schemas.render_account(account, states[account.id]), headers={"ETag": _entry_etag(account)})

    @put(
        "/accounts/{name:str}",
        summary="Make or replace an account",
        description=_PUT_DESCRIPTION,
        response_headers=openapi.response_headers("ETag"),
        responses=openapi.operator_problems("malformed-request", "outdated", *CHANGE_PROBLEMS),
    )
    async def put_account(
        name: NewName, data: JSONBody[schemas.AccountBody], if_match: IfMatch = None, if_none_match: IfNoneMatch = None
    ) -> Response[schemas.Account]:
        def desire(before: tenants.Account | None) -> DesiredAccount:
            _check_preconditions(before, if_match, if_none_match)
            return data.to_desired(validate_name(name))

        return await render(await registry_admin.save_account(name, desire))

    @patch(
        "/accounts/{name:str}",
        summary="Change some settings of an account",
        description=_PATCH_DESCRIPTION,
        response_headers=openapi.response_headers("ETag"),
        responses=openapi.operator_problems(404, "malformed-request", "outdated", *CHANGE_PROBLEMS),
    )
    async def patch_account(name: TenantName, data: MergePatch, if_match: IfMatch = None) -> Response[schemas.Account]:
        def desire(before: tenants.Account | None) -> DesiredAccount:
            account = require(before, name, "account")
            _check_preconditions(account, if_match)
            return _apply_patch(schemas.AccountBody, schemas.account_spec(account), data).to_desired(account.name)

        return await render(await registry_admin.save_account(name, desire))

    @get(
        "/accounts",
        summary="List the accounts",
        description="All of them, by name, each with its balance, state and open submissions.",
        responses=openapi.operator_problems("ledger-unavailable"),
    )
    async def list_accounts() -> schemas.AccountList:
        accounts = await registry_admin.list_accounts()
        states = await registry_admin.account_states(accounts)
        return schemas.AccountList([schemas.render_account(account, states[account.id]) for account in accounts])

    @get(
        "/accounts/{name:str}",
        summary="Read an account: balance, state, open submissions",
        description="The balance is an observation: what the upstream reported last, and when. Its key is never shown.",
        responses=openapi.operator_problems(404, "ledger-unavailable"),
    )
    async def read_account(name: TenantName) -> Response[schemas.Account]:
        return await render(await registry_admin.get_account(name))

    @delete(
        "/accounts/{name:str}",
        summary="Delete an account",
        description="Refused while its tasks run or a tenant uses it. `force` removes it from its tenants.",
        responses=openapi.operator_problems(404, "conflict", *CHANGE_PROBLEMS),
    )
    async def delete_account(name: TenantName, force: ForceDelete = False) -> None:
        await registry_admin.delete_account(name, force=force)

    @post(
        "/accounts/{name:str}/reopen",
        summary="Check an exhausted or invalid account again now",
        description="For example after a top-up: the next submission tries it, without waiting for the next check.",
        responses=openapi.operator_problems("forbidden", 404, "ledger-unavailable"),
        status_code=200,
    )
    async def reopen_account(name: TenantName) -> Response[schemas.Account]:
        return await render(await registry_admin.reopen_account(name))

    return [put_account, patch_account, list_accounts, read_account, delete_account, reopen_account]


def _tenant_routes(registry_admin: RegistryAdmin, quota: QuotaReports) -> Sequence[HTTPRouteHandler]:
    def render(tenant: tenants.Tenant, policies: Sequence[PolicyReport], secret: str | None = None) -> schemas.Tenant:
        tokens, warnings = registry_admin.list_tokens(tenant), registry_admin.registry.current.limit_warnings(tenant)
        return schemas.render_tenant(tenant, tokens, policies, warnings, secret)

    async def respond(tenant: tenants.Tenant, secret: str | None = None) -> Response[schemas.Tenant]:
        (policies,) = await quota.list_policies([tenant])
        return Response(render(tenant, policies, secret), headers={"ETag": _entry_etag(tenant)})

    @put(
        "/tenants/{name:str}",
        summary="Make or replace a tenant",
        description=_PUT_DESCRIPTION,
        request_class=TenantRequest,
        response_headers=openapi.response_headers("ETag"),
        responses=openapi.operator_problems("malformed-request", "outdated", *CHANGE_PROBLEMS),
    )
    async def put_tenant(
        name: NewName, data: JSONBody[schemas.TenantBody], if_match: IfMatch = None, if_none_match: IfNoneMatch = None
    ) -> Response[schemas.Tenant]:
        def desire(before: tenants.Tenant | None) -> DesiredTenant:
            _check_preconditions(before, if_match, if_none_match)
            return data.to_desired(validate_name(name))

        saved = await registry_admin.save_tenant(name, desire)
        return await respond(saved.tenant, saved.generated_secret)

    @patch(
        "/tenants/{name:str}",
        summary="Change some settings of a tenant",
        description=_PATCH_DESCRIPTION,
        request_class=TenantRequest,
        response_headers=openapi.response_headers("ETag"),
        responses=openapi.operator_problems(404, "malformed-request", "outdated", *CHANGE_PROBLEMS),
    )
    async def patch_tenant(name: TenantName, data: MergePatch, if_match: IfMatch = None) -> Response[schemas.Tenant]:
        def desire(before: tenants.Tenant | None) -> DesiredTenant:
            tenant = require(before, name, "tenant")
            _check_preconditions(tenant, if_match)
            return _patch_tenant(tenant, data)

        saved = await registry_admin.save_tenant(name, desire)
        return await respond(saved.tenant, saved.generated_secret)

    @get(
        "/tenants",
        summary="List the tenants",
        description="All of them, by name, each with its policies, use and tokens.",
        responses=openapi.operator_problems("ledger-unavailable"),
    )
    async def list_tenants() -> schemas.TenantList:
        listed = await registry_admin.list_tenants()
        return schemas.TenantList(await run_in_turns(map(render, listed, await quota.list_policies(listed))))

    @get(
        "/tenants/{name:str}",
        summary="Read a tenant: policies, use, tokens",
        description="Of its tokens the ids, labels and times. Neither they nor secrets are shown.",
        responses=openapi.operator_problems(404, "ledger-unavailable"),
    )
    async def read_tenant(name: TenantName) -> Response[schemas.Tenant]:
        return await respond(await registry_admin.get_tenant(name))

    @delete(
        "/tenants/{name:str}",
        summary="Delete a tenant and its tokens",
        description="Refused while its tasks run, unless `force` is set. Its usage is kept.",
        responses=openapi.operator_problems(404, "conflict", *CHANGE_PROBLEMS),
    )
    async def delete_tenant(name: TenantName, force: ForceDelete = False) -> None:
        await registry_admin.delete_tenant(name, force=force)

    return [put_tenant, patch_tenant, list_tenants, read_tenant, delete_tenant]


def _token_routes(registry_admin: RegistryAdmin) -> Sequence[HTTPRouteHandler]:
    @post(
        "/tenants/{name:str}/tokens",
        summary="Make a token for a tenant, shown only once",
        description="The gateway stores a hash of it. A tenant may have several, for example during a rotation.",
        responses=openapi.operator_problems(404, "malformed-request", *CHANGE_PROBLEMS),
    )
    async def create_token(name: TenantName, data: JSONBody[schemas.TokenBody | None] = None) -> schemas.NewToken:
        body = data or schemas.TokenBody()
        created = await registry_admin.create_token(name, body.label, body.checked_expires_at(registry_admin.now()))
        return schemas.NewToken(created.token.id, created.text, schemas.token_expires_at(created.token))

    @delete(
        "/tenants/{name:str}/tokens/{token_id:str}",
        summary="Revoke a token, at once or after a grace period",
        description="Streams, waits and downloads with it end too.",
        responses=openapi.operator_problems(404, *CHANGE_PROBLEMS),
    )
    async def revoke_token(name: TenantName, token_id: FromPath[str], grace: TokenGrace = 0) -> None:
        await registry_admin.revoke_token(name, token_id, grace)

    @post(
        "/tenants/{name:str}/revoke-all",
        summary="Revoke all tokens of a tenant at once",
        description="Without a grace period, for example after a leak. Make new ones afterwards.",
        responses=openapi.operator_problems("forbidden", 404, "ledger-unavailable", "overloaded"),
        status_code=200,
    )
    async def revoke_all_tokens(name: TenantName) -> schemas.RevokedTokens:
        return schemas.RevokedTokens(list(await registry_admin.revoke_all_tokens(name)))

    return [create_token, revoke_token, revoke_all_tokens]


def validate_name(name: str) -> str:
    """Return a name that is allowed for a new entry. Raises InvalidOptions."""
    if not re.search(_NAME_PATTERN, name):
        raise InvalidOptions([FieldError("name", f"must {NAME_RULE}")])
    return name


_MAX_LISTED = 1_000
SecretGrace = Annotated[
    float, QueryParameter(ge=0, le=31_536_000, description="Seconds for which the previous secret also signs.")
]
DeliveryId = Annotated[str, PathParameter(description="The `id` of the delivery, its `webhook-id`.")]
MaxListed = Annotated[int, QueryParameter(ge=1, le=_MAX_LISTED, description="The most deliveries to return.")]


def webhook_routes(webhooks: WebhookAdmin) -> Sequence[HTTPRouteHandler]:
    @post(
        "/tenants/{name:str}/webhook-secret",
        summary="Make a new webhook secret for a tenant, shown only once",
        description="During the grace period both secrets sign, so that the receiver can change over.",
        responses=openapi.operator_problems(404, "conflict", *CHANGE_PROBLEMS),
    )
    async def rotate_webhook_secret(name: TenantName, grace: SecretGrace = 0) -> schemas.NewSecret:
        generated = await webhooks.rotate_secret(name, grace)
        return schemas.NewSecret(generated.text, schemas.seconds_to_datetime(generated.previous_expires_at))

    @get(
        "/webhooks/failed",
        summary="List failed webhook deliveries, newest first",
        description="Kept for 30 days.",
        responses=openapi.operator_problems("ledger-unavailable"),
    )
    async def list_failed_webhooks(limit: MaxListed = 100) -> schemas.DeliveryList:
        return schemas.DeliveryList([schemas.render_delivery(entry) for entry in await webhooks.list_failed(limit)])

    @post(
        "/webhooks/{delivery_id:str}/redeliver",
        summary="Send a webhook again",
        description="Failed ones, and those delivered in the last three days.",
        responses=openapi.operator_problems("forbidden", 404, "ledger-unavailable"),
        status_code=200,
    )
    async def redeliver_webhook(delivery_id: DeliveryId) -> schemas.Delivery:
        return schemas.render_delivery(await webhooks.redeliver(delivery_id))

    return [rotate_webhook_secret, list_failed_webhooks, redeliver_webhook]


def clock_routes(registry_admin: RegistryAdmin) -> Sequence[HTTPRouteHandler]:
    @post(
        "/clock/reset",
        summary="Set the ledger's time back to the clock of Redis",
        description=(
            "When the clock of Redis steps back, the ledger's time stays ahead of it and reduces the offset slowly. "
            "This sets the offset to 0 at once and moves leases, checks, deliveries and probes by as much."
        ),
        response_description="The former offset",
        responses=openapi.operator_problems("forbidden", "ledger-unavailable"),
        status_code=200,
    )
    async def reset_clock() -> schemas.ClockReset:
        return schemas.ClockReset(await registry_admin.reset_clock() / 1000)

    return [reset_clock]
