"""The refusal of submissions beyond the queue, before litestar's handler and before the body is read."""

from __future__ import annotations

from collections.abc import Callable

from litestar.types import ASGIApp, Receive, Scope, Send

from service.api import errors
from service.api.auth import TenantAuth
from service.api.upload_memory import UploadMemory
from service.domain.errors import GatewayError, Overloaded


def overload_middleware(tenant_auth: TenantAuth, memory: UploadMemory) -> Callable[[ASGIApp], ASGIApp]:
    # A function, since litestar makes deep copies of what else it is given.
    return lambda app: _OverloadMiddleware(app, tenant_auth, memory)


class _OverloadMiddleware:
    """Refuses submissions that may not wait, since refusals take the time of those that are accepted."""

    def __init__(self, app: ASGIApp, tenant_auth: TenantAuth, memory: UploadMemory) -> None:
        self._app = app
        self._tenant_auth = tenant_auth
        self._memory = memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._memory.is_waiting:
            try:
                tenant, _ = self._tenant_auth.authenticate_header(
                    scope, dict(scope["headers"]).get(b"authorization", b"")
                )
                self._memory.check_queue(tenant.id)
            except Overloaded as error:
                await errors.send_problem(scope, send, errors.to_problem(error))
                return
            except GatewayError:  # raised again behind a delay
                pass
        await self._app(scope, receive, send)
