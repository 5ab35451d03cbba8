"""Client of the operators' port, which all commands use, so that every change is logged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

import click
import httpx2
import msgspec

from service.cli.common import CommandError, json_option, load_settings
from service.cli.formatting import Fields, format_record, format_value
from service.client import Problem, single_line
from service.domain.hosts import parse_base_url
from service.setting_types import parse_printable
from service.settings import Settings

T = TypeVar("T")
_OUTDATED = 412
_MAX_ATTEMPTS = 5
_JSON_TYPE = "application/json"
_HTTP_TIMEOUT = httpx2.Timeout(30.0, connect=5.0)
_LOOPBACK_BY_WILDCARD = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class ProblemError(CommandError):
    """A problem document: `title: detail` and a line for each of its `errors`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def show(self, file: Any = None) -> None:  # noqa: ARG002 - always on standard error
        click.echo(self.message, err=True)


class AdminResponse:
    """A response from `url`, or a part of it; `version` is its ETag."""

    def __init__(self, url: str, content: bytes, version: str | None = None) -> None:
        self._url = url
        self.content = content
        self.version = version

    def with_members(self, **members: Any) -> AdminResponse:
        return AdminResponse(self._url, msgspec.json.encode(members))

    def decode(self, schema: type[T]) -> T:
        """Raises CommandError."""
        try:
            return msgspec.json.decode(self.content, type=schema)
        except msgspec.DecodeError as error:
            raise _unexpected_response(self._url, single_line(str(error))) from None

    def format_json(self) -> str:
        """Return indented JSON. Raises CommandError."""
        self.decode(object)
        return msgspec.json.format(self.content, indent=2).decode()


class AdminClient:
    """Client of `/admin/v1`. Every call raises CommandError, and none is repeated."""

    def __init__(self, url: str, http: httpx2.Client) -> None:
        self._url = url
        self._http = http

    def request(
        self,
        method: str,
        *path: str,
        body: Mapping[str, Any] | None = None,
        accept: str = _JSON_TYPE,
        version: str | None = None,
        is_new: bool = False,
        **query: Any,
    ) -> AdminResponse:
        """Send a request to the parts of a path. `version` becomes `If-Match`, `is_new` forbids to replace an entry."""
        for part in path:
            if part in {"", ".", ".."} or "/" in part:
                # Servers normalize such a path even if it is quoted.
                raise CommandError(f"there is no {single_line(part)!r}")
        address = "/".join(["/admin/v1", *(quote(part, safe="") for part in path)])
        content = None if body is None else msgspec.json.encode(body)
        headers = {"Accept": accept} | ({} if body is None else {"Content-Type": _JSON_TYPE})
        headers |= {} if version is None else {"If-Match": version}
        headers |= {"If-None-Match": "*"} if is_new else {}
        try:
            response = self._http.request(method, address, content=content, headers=headers, params=query)
        except httpx2.RequestError as error:
            raise self._map_transport_error(method, error) from None
        if response.is_success:
            media_type = response.headers.get("content-type", "").partition(";")[0]
            if accept not in {_JSON_TYPE, media_type}:  # JSON is checked when it is decoded
                raise _unexpected_response(self._url, f"no {accept}")
            return AdminResponse(self._url, response.content, response.headers.get("etag"))
        try:
            problem = msgspec.json.decode(response.content, type=Problem)
        except msgspec.DecodeError:
            raise _unexpected_response(self._url, f"HTTP {response.status_code}") from None
        raise ProblemError(response.status_code, _describe_problem(problem))

    def create(self, section: str, name: str, body: Mapping[str, Any]) -> AdminResponse:
        """Create an entry. Raises CommandError, also if the name is taken."""
        try:
            return self.request("PUT", section, name, body=body, is_new=True)
        except ProblemError as error:
            if error.status != _OUTDATED:
                raise
            noun = section.removesuffix("s")
            raise CommandError(f"the {noun} {name} exists already: use `gateway {noun} update`") from None

    def _map_transport_error(self, method: str, error: httpx2.RequestError) -> CommandError:
        why = single_line(str(error)) or type(error).__name__
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            hint = "Start it, or use --url for its operators' port."
            return CommandError(f"can't connect to {self._url}: {why}. {hint}")
        hint = "" if method == "GET" else " The change may have been made: check before you repeat it."
        return CommandError(f"no response from {self._url}: {why}.{hint}")


def change_entry(
    client: AdminClient,
    path: tuple[str, str],
    entry: tuple[type[T], Callable[[T], Fields]],
    make_patch: Callable[[T], Mapping[str, Any]],
    *,
    as_json: bool,
) -> T:
    """Send the patch of an entry, and print what changed. Return the entry. Raises CommandError."""
    schema, list_settings = entry
    before, patch, response = _patch_current(client, path, schema, make_patch)
    secrets = {"user key": patch.get("user_key"), "webhook secret": (patch.get("webhook") or {}).get("secret")}
    old = {label: format_value(value) for label, value in list_settings(before)}

    def format_changes(after: T) -> str:
        changes: list[tuple[str, object]] = [
            (label, f"{old[label]} -> {format_value(value)}" if label in old else value)
            for label, value in list_settings(after)
            if old.get(label) != format_value(value)
        ]
        changes += [(label, "changed") for label, secret in secrets.items() if secret]
        return format_record(*changes) if changes else "Nothing changed."

    after = response.decode(schema)
    click.echo(response.format_json() if as_json else format_changes(after))
    return after


def _patch_current(
    client: AdminClient, path: tuple[str, str], schema: type[T], make_patch: Callable[[T], Mapping[str, Any]]
) -> tuple[T, Mapping[str, Any], AdminResponse]:
    """Patch an entry as it was read, again if it changed meanwhile. Return it as read, the patch and the response."""
    attempts = 0
    while True:
        attempts += 1
        current = client.request("GET", *path)
        before = current.decode(schema)
        patch = make_patch(before)
        try:
            return before, patch, client.request("PATCH", *path, body=patch, version=current.version)
        except ProblemError as error:
            if error.status != _OUTDATED or attempts == _MAX_ATTEMPTS:
                raise


def with_admin_client(command: Callable[..., None]) -> Callable[..., None]:
    """Pass a client with the operator's token as the first argument, and add the option for its address."""

    @click.option(
        "--url", help="Address of the operators' port.  [default: from GATEWAY_OPS_HOST and GATEWAY_OPS_PORT]"
    )
    @functools.wraps(command)
    def run_command(*, url: str | None, **arguments: Any) -> None:
        settings = load_settings()
        base = check_url(url or ops_url(settings))
        headers = {"Authorization": f"Bearer {read_admin_token(settings)}"}
        # A proxy from the environment would receive the token.
        with httpx2.Client(base_url=base, headers=headers, timeout=_HTTP_TIMEOUT, trust_env=False) as http:
            command(AdminClient(base, http), **arguments)

    return run_command


def print_response(
    schema: type[T], format_text: Callable[[T], str]
) -> Callable[[Callable[..., AdminResponse]], Callable[..., None]]:
    """Pass a client to a command and print the response that it returns, as text or with `--json` as it is."""

    def wrap_command(command: Callable[..., AdminResponse]) -> Callable[..., None]:
        @json_option
        @with_admin_client
        @functools.wraps(command)
        def run_command(client: AdminClient, *, as_json: bool, **arguments: Any) -> None:
            response = command(client, **arguments)
            click.echo(response.format_json() if as_json else format_text(response.decode(schema)))

        return run_command

    return wrap_command


def check_url(url: str) -> str:
    """Return an address without a trailing slash. Raises CommandError."""
    base = url.rstrip("/")
    try:
        parse_base_url(base)
        httpx2.URL(base)
    except (ValueError, httpx2.InvalidURL):
        raise CommandError(f"{single_line(base)} is no address such as http://127.0.0.1:8081") from None
    return base


def ops_url(settings: Settings) -> str:
    if not settings.ops_port:
        raise CommandError("GATEWAY_OPS_PORT is 0, any free port: use --url")
    host = _LOOPBACK_BY_WILDCARD.get(settings.ops_host, settings.ops_host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.ops_port}"


def read_admin_token(settings: Settings) -> str:
    """Return the token of the settings, or the one that a gateway in development generated."""
    if settings.admin_token:
        return settings.admin_token
    file = settings.data_dir / "admin.token"
    try:
        return parse_printable(file.read_text().strip())
    except (OSError, ValueError):
        raise CommandError(
            "there is no operator's token: set GATEWAY_ADMIN_TOKEN or GATEWAY_ADMIN_TOKEN_FILE to yours "
            f"(a gateway in development generates {file})"
        ) from None


def _describe_problem(problem: Problem) -> str:
    errors = [f"{error.field}: {error.detail}" for error in problem.errors]
    detail = "" if problem.detail == "; ".join(errors) else f" {single_line(problem.detail)}"
    return "\n  ".join([f"{single_line(problem.title)}:{detail}", *map(single_line, errors)])


def _unexpected_response(url: str, why: str) -> CommandError:
    return CommandError(f"{url} is no operators' port of this version ({why})")
