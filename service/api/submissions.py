"""Submissions of tenants: their content, and the image wherever it is."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from litestar import Request
from msgspec import Struct

from service.api.auth import TenantAuth
from service.api.uploads import Upload, UploadReader
from service.domain.errors import FieldError, InvalidOptions
from service.domain.image_urls import IMAGE_URL_FIELD, check_image_url, parse_image_url
from service.domain.tasks import Catalogue, Kind, Options, check_metadata, parse_metadata, parse_options
from service.domain.tenants import Tenant
from service.domain.webhooks import resolve_webhook_url
from service.usecases.ports import FetchImage, Image
from service.usecases.submit import Submission, Submitter
from service.usecases.task_status import TenantSlots

IMAGE_PART = "image"
_METADATA_FIELD, _WEBHOOK_FIELD = "metadata", "webhook_url"
_NON_OPTION_FIELDS = frozenset({_METADATA_FIELD, _WEBHOOK_FIELD})


class _Content(Struct, frozen=True):
    """A submission without its image."""

    options: Options
    metadata: dict[str, str]
    webhook_url: str | None


@dataclass(kw_only=True, eq=False, repr=False)
class SubmissionReceiver:
    """Receives submissions and submits them; `fetches` bounds those whose image is being fetched."""

    tenant_auth: TenantAuth
    submitter: Submitter
    uploads: UploadReader
    catalogue: Catalogue
    fetch_image: FetchImage
    fetches: TenantSlots

    async def receive(self, request: Request[Any, Any, Any], tenant: Tenant, kind: Kind, key: str | None) -> Submission:
        """Read a submission, fetch its image if it is elsewhere, and submit it.

        Nothing holds the image once this returns, while the end of the task is awaited. Raises the errors of
        `UploadReader`, FetchImage and `Submitter`.
        """
        async with self.uploads.receive(
            request.scope,
            request.receive,
            part=IMAGE_PART,
            url_field=IMAGE_URL_FIELD,
            owner=tenant.id,
            has_digest=key is not None,
        ) as upload:
            tenant = self.tenant_auth.authenticate(request)  # again: the upload may have taken minutes
            self.submitter.check_allowed(tenant, kind)
            content = _parse_content(upload, tenant, kind, self.catalogue)
            if isinstance(upload.source, Image):
                return await self._submit(tenant, content, upload.source, key)
            url = parse_image_url(upload.source)
        return await self._submit_from_url(request, tenant, content, url, key)

    async def _submit_from_url(
        self, request: Request[Any, Any, Any], tenant: Tenant, content: _Content, url: str, key: str | None
    ) -> Submission:
        # The same request as before has its response even if the image is gone, or its host no longer allowed.
        if key is not None and (
            replay := await self.submitter.find_replay(
                tenant, content.options, content.metadata, url, idempotency_key=key, webhook_url=content.webhook_url
            )
        ):
            return replay
        check_image_url(tenant, url)
        async with AsyncExitStack() as stack:
            stack.enter_context(self.fetches.hold(tenant.id))
            fetch = self.uploads.fetch(self.fetch_image(url, tenant), tenant.id, has_digest=key is not None)
            image = await self.tenant_auth.run_while_authorized(request, stack.enter_async_context(fetch))
            tenant = self.tenant_auth.authenticate(request)
            return await self._submit(tenant, content, image, key, url)

    async def _submit(
        self, tenant: Tenant, content: _Content, image: Image, key: str | None, url: str | None = None
    ) -> Submission:
        return await self.submitter.submit(
            tenant,
            content.options,
            content.metadata,
            image,
            idempotency_key=key,
            webhook_url=content.webhook_url,
            image_url=url,
        )


def _parse_content(upload: Upload, tenant: Tenant, kind: Kind, catalogue: Catalogue) -> _Content:
    """Raises InvalidOptions."""
    extras, option_fields = _split_fields(upload)
    options = parse_options(kind, option_fields, catalogue, is_typed=upload.is_typed)
    parse_labels = check_metadata if upload.is_typed else parse_metadata
    metadata = parse_labels(extras[_METADATA_FIELD]) if _METADATA_FIELD in extras else {}
    return _Content(options, metadata, resolve_webhook_url(tenant.webhook, extras.get(_WEBHOOK_FIELD)))


def _split_fields(upload: Upload) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Separate the fields that are no options; empty ones of a form are dropped. Raises InvalidOptions for repeats."""
    extras: dict[str, Any] = {}
    errors = []
    for name, value in upload.fields:
        if name not in _NON_OPTION_FIELDS or not (value or upload.is_typed):
            continue
        if name in extras:
            errors.append(FieldError(name, "is given more than once"))
        if name == _WEBHOOK_FIELD and not isinstance(value, str):
            errors.append(FieldError(name, "must be text"))
        extras[name] = value
    if errors:
        raise InvalidOptions(errors)
    return extras, [field for field in upload.fields if field[0] not in _NON_OPTION_FIELDS]
