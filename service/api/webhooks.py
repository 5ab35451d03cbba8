"""The operators' calls for webhooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from litestar import get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import PathParameter, QueryParameter

from service.api import openapi
from service.api.webhook_views import (
    DeliveryList,
    DeliveryView,
    NewSecretView,
    delivery_view,
    new_secret_view,
)
from service.usecases.admin import Webhooks

_MOST_LISTED = 1_000

Name = Annotated[str, PathParameter(description="The name.")]
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
