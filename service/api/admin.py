"""The operators' calls for accounts, tenants and tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from litestar import delete, get, post, put
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath, JSONBody, PathParameter, QueryParameter

from service.api import openapi
from service.api.admin_views import (
    AccountBody,
    AccountList,
    AccountView,
    NewTokenView,
    TenantBody,
    TenantList,
    TenantView,
    TokenBody,
    account_view,
    expiry,
    tenant_view,
)
from service.domain.errors import FieldError, InvalidOptions
from service.domain.tenants import NAME_MUST, Account, Tenant
from service.usecases.admin import Operators
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
