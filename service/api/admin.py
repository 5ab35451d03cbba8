"""Routes for accounts, tenants, tokens, webhooks, the registry and the clock."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from litestar import Response, delete, get, patch, post, put
from litestar.enums import RequestEncodingType
from litestar.handlers import HTTPRouteHandler
from litestar.params import BodyKwarg, FromPath, HeaderParameter, JSONBody, PathParameter, QueryParameter
from msgspec.structs import replace

from service.api import admin_schemas as schemas
from service.api import openapi
from service.api.admin_schemas import Difference, DifferenceKind
from service.api.errors import find_body_errors
from service.api.params import JsonRequest
from service.domain import tenants
from service.domain.errors import ErrorCollector, FieldError, InvalidOptions, VersionConflict, field_path
from service.domain.tenants import NAME_RULE, strip_query
from service.usecases.admin import RegistryAdmin, require
from service.usecases.background import run_in_turns
from service.usecases.registry_plan import DesiredAccount, DesiredTenant, RegistryPlan
from service.usecases.reports import PolicyReport, QuotaReports
from service.usecases.webhook_delivery import WebhookAdmin

_NAME_PATTERN = r"\A[a-z0-9][a-z0-9._-]{0,62}\Z"
NewName = Annotated[str, PathParameter(schema_extra={"pattern": _NAME_PATTERN}, description="A name of your choice.")]
TenantName = Annotated[str, PathParameter(description="The name.")]
ForceDelete = Annotated[bool, QueryParameter(description="Even if tasks run or other entries refer to it.")]
TokenGrace = Annotated[float, QueryParameter(ge=0, le=31_536_000, description="Seconds for which it stays valid.")]
_PUT_DESCRIPTION = "Omitted fields get their defaults, only secrets are kept. Its `id` stays the same."
_PATCH_DESCRIPTION = "Changes the fields that are in the body, and keeps the others."
_CHANGE_PROBLEMS = ("forbidden", "ledger-unavailable", "overloaded")


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
        responses=openapi.operator_problems("malformed-request", "outdated", *_CHANGE_PROBLEMS),
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
        responses=openapi.operator_problems(404, "malformed-request", "outdated", *_CHANGE_PROBLEMS),
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
        responses=openapi.operator_problems(404, "conflict", *_CHANGE_PROBLEMS),
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
        responses=openapi.operator_problems("malformed-request", "outdated", *_CHANGE_PROBLEMS),
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
        responses=openapi.operator_problems(404, "malformed-request", "outdated", *_CHANGE_PROBLEMS),
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
        responses=openapi.operator_problems(404, "conflict", *_CHANGE_PROBLEMS),
    )
    async def delete_tenant(name: TenantName, force: ForceDelete = False) -> None:
        await registry_admin.delete_tenant(name, force=force)

    return [put_tenant, patch_tenant, list_tenants, read_tenant, delete_tenant]


def _token_routes(registry_admin: RegistryAdmin) -> Sequence[HTTPRouteHandler]:
    @post(
        "/tenants/{name:str}/tokens",
        summary="Make a token for a tenant, shown only once",
        description="The gateway stores a hash of it. A tenant may have several, for example during a rotation.",
        responses=openapi.operator_problems(404, "malformed-request", *_CHANGE_PROBLEMS),
    )
    async def create_token(name: TenantName, data: JSONBody[schemas.TokenBody | None] = None) -> schemas.NewToken:
        body = data or schemas.TokenBody()
        created = await registry_admin.create_token(name, body.label, body.checked_expires_at(registry_admin.now()))
        return schemas.NewToken(created.token.id, created.text, schemas.token_expires_at(created.token))

    @delete(
        "/tenants/{name:str}/tokens/{token_id:str}",
        summary="Revoke a token, at once or after a grace period",
        description="Streams, waits and downloads with it end too.",
        responses=openapi.operator_problems(404, *_CHANGE_PROBLEMS),
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


_KEY_PATH, _SECRET_PATH, _URL_PATH = ("user_key", "value"), ("webhook", "secret", "value"), ("webhook", "url")


def diff_registry(plan: RegistryPlan, now: float) -> list[Difference]:
    """Return what a plan changes, at `now` (seconds since the epoch). Secrets are not shown."""
    before, after = (
        _to_plain(schemas.render_registry(version, now), plan.assigned_ids) for version in (plan.before, plan.after)
    )
    keys = plan.changed_keys & plan.before.accounts.keys()
    secrets = plan.changed_secrets & plan.before.tenants.keys()
    differences = [
        *_diff_mappings(before, after),
        *(Difference(field_path("accounts", name, *_KEY_PATH), DifferenceKind.CHANGED) for name in keys),
        *(Difference(field_path("tenants", name, *_SECRET_PATH), DifferenceKind.CHANGED) for name in secrets),
        *(
            Difference(field_path("tenants", name, *_SECRET_PATH), DifferenceKind.ADDED)
            for name in plan.generated_secrets
        ),
    ]
    return sorted(differences, key=lambda difference: difference.path)


def _to_plain(body: schemas.RegistryBody, assigned_ids: Collection[int]) -> dict[str, Any]:
    # Without the ids that the gateway assigns: a dry run can't know them.
    plain: dict[str, Any] = {"accounts": {}, "tenants": {}} | msgspec.to_builtins(body)
    for entries in plain.values():
        for entry in entries.values():
            if entry["id"] in assigned_ids:
                del entry["id"]
    return plain


def _diff_mappings(before: Mapping[str, Any], after: Mapping[str, Any], *parent: str) -> Iterator[Difference]:
    for key in sorted({*before, *after}):
        old, new, path = before.get(key), after.get(key), (*parent, key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _diff_mappings(old, new, *path)
            continue
        name, old, new = field_path(*path), _redact_urls(old, *path), _redact_urls(new, *path)
        if key not in before:
            yield Difference(name, DifferenceKind.ADDED, after=new)
        elif key not in after:
            yield Difference(name, DifferenceKind.REMOVED, before=old)
        elif before[key] != after[key]:
            yield Difference(name, DifferenceKind.CHANGED, old, new)


def _redact_urls(value: Any, *path: str) -> Any:
    """Remove the queries of webhook URLs: the differences may be logged where the registry is applied."""
    if isinstance(value, dict):
        return {key: _redact_urls(item, *path, key) for key, item in value.items()}
    if path[-2:] == _URL_PATH and value is not None and strip_query(value) != value:
        return f"{strip_query(value)}?…"
    return value


_MAX_REGISTRY_BYTES = 32_000_000
ForceApply = Annotated[bool, QueryParameter(description="Remove also entries with running tasks, even all entries.")]
Prune = Annotated[bool, QueryParameter(description="Remove accounts, tenants and tokens not in the request.")]
DryRun = Annotated[bool, QueryParameter(description="Change nothing, only return the differences.")]


def registry_routes(registry_admin: RegistryAdmin) -> Sequence[HTTPRouteHandler]:
    @get(
        "/registry",
        summary="Read the whole registry, for example to keep it in a file",
        description="With the hashes of tokens and the sources of secrets, without secrets.",
        response_headers=openapi.response_headers("ETag"),
        responses=openapi.operator_problems("ledger-unavailable"),
    )
    async def read_registry() -> Response[schemas.RegistryBody]:
        current = await registry_admin.load_registry()
        return Response(
            schemas.render_registry(current, registry_admin.now()), headers={"ETag": _registry_etag(current.version)}
        )

    @put(
        "/registry",
        summary="Apply a whole registry, completely or not at all",
        description="Entries replace those of the same name: omitted fields get their defaults, only ids and secrets "
        "are kept. Other entries stay, unless `prune` is set. A repetition changes nothing.",
        response_headers=openapi.response_headers("ETag"),
        responses=openapi.operator_problems("malformed-request", "conflict", "outdated", *_CHANGE_PROBLEMS),
        request_class=TenantRequest,
        request_max_body_size=_MAX_REGISTRY_BYTES,
    )
    async def put_registry(
        data: JSONBody[schemas.RegistryBody],
        if_match: IfMatch = None,
        dry_run: DryRun = False,
        prune: Prune = False,
        force: ForceApply = False,
    ) -> Response[schemas.ApplyResult]:
        def version_matches(version: int) -> bool:
            return if_match is None or etag_matches(if_match, _registry_etag(version))

        desired = data.to_desired(prune=prune)
        plan = await registry_admin.apply(desired, force=force, dry_run=dry_run, version_matches=version_matches)
        is_applied = plan.change is not None and not dry_run
        result = schemas.ApplyResult(
            applied=is_applied,
            differences=diff_registry(plan, registry_admin.now()),
            unmanaged=list(plan.unmanaged),
            generated_secrets=dict(plan.generated_secrets) if is_applied else {},
            warnings=[
                f"{field_path('tenants', name, 'limits')} {warning}"
                for name, tenant in sorted(plan.after.tenants.items())
                for warning in plan.after.limit_warnings(tenant)
            ],
        )
        version = plan.after.version if is_applied else plan.before.version
        return Response(result, headers={"ETag": _registry_etag(version)})

    @post(
        "/registry/rotate-keys",
        summary="Encrypt all secrets with the first of the secret keys",
        description="Afterwards the other keys can be removed. All processes must already have the first key. The "
        "secrets themselves stay the same; a repetition changes nothing.",
        responses=openapi.operator_problems("forbidden", "ledger-unavailable", "overloaded"),
        status_code=200,
    )
    async def rotate_keys() -> schemas.ReencryptResult:
        secrets = await registry_admin.reencrypt_secrets()
        return schemas.ReencryptResult(list(secrets.accounts), list(secrets.tenants), list(secrets.undecryptable))

    return [read_registry, put_registry, rotate_keys]


def _registry_etag(version: int) -> str:
    return f'"{version}"'


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
        responses=openapi.operator_problems(404, "conflict", *_CHANGE_PROBLEMS),
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
