"""Routes for the whole registry."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from litestar import Response, get, post, put
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody, QueryParameter

from service.api import openapi
from service.api import registry_schemas as schemas
from service.api.admin import CHANGE_PROBLEMS, IfMatch, TenantRequest, etag_matches
from service.api.registry_schemas import Difference, DifferenceKind
from service.domain.errors import field_path
from service.domain.tenants import strip_query
from service.usecases.admin import RegistryAdmin
from service.usecases.registry_plan import RegistryPlan

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
        responses=openapi.operator_problems("malformed-request", "conflict", "outdated", *CHANGE_PROBLEMS),
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
