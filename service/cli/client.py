"""How commands ask a running gateway, on its operators' port: there is one way to change things, and it is logged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import click
import httpx2
import msgspec

from service.cli.common import load_settings
from service.cli.formatting import single_line
from service.settings import Settings, parse_http_url, parse_printable

T = TypeVar("T")
NOT_FOUND = 404
_JSON_TYPE = "application/json"
_HTTP_TIMEOUT = httpx2.Timeout(30.0, connect=5.0)
_LOOPBACK_BY_WILDCARD = {"0.0.0.0": "127.0.0.1", "::": "::1"}
json_option = click.option("--json", "as_json", is_flag=True, help="Print the gateway's answer as it is, for scripts.")


class CommandError(click.ClickException):
    """What ends a command with exit code 1; the message says to a person why."""

    def show(self, file: Any = None) -> None:
        """Print the message, without the word `Error` that Click would put in front."""
        click.echo(self.message, file=file, err=file is None)


class ProblemError(CommandError):
    """The gateway answered with a problem document, `title: detail` and a line for each of its `errors`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FieldError(msgspec.Struct, frozen=True):
    """What is wrong with one field."""

    field: str
    detail: str

    def __str__(self) -> str:
        return f"{self.field}: {self.detail}"


class ProblemDocument(msgspec.Struct, frozen=True):
    """As much of a problem document as a person needs."""

    title: str
    detail: str
    errors: tuple[FieldError, ...] = ()

    def __str__(self) -> str:
        faults = [str(each) for each in self.errors]
        detail = "" if self.detail == "; ".join(faults) else f" {single_line(self.detail)}"
        return "\n  ".join([f"{single_line(self.title)}:{detail}", *map(single_line, faults)])


class AdminResponse:
    """What the gateway answered at `url`, or a part of it; `version` is its ETag."""

    def __init__(self, url: str, content: bytes, version: str | None = None) -> None:
        self._url = url
        self._content = content
        self.version = version

    def with_members(self, **members: Any) -> AdminResponse:
        """Only these members of it."""
        return AdminResponse(self._url, msgspec.json.encode(members))

    def decode(self, kind: type[T]) -> T:
        """The answer as a value. Raises CommandError."""
        try:
            return msgspec.json.decode(self._content, type=kind)
        except msgspec.DecodeError as error:
            raise _unexpected_response(self._url, single_line(str(error))) from None

    def text(self) -> str:
        """The answer as it is."""
        return self._content.decode()

    def format_json(self) -> str:
        """The answer as indented JSON. Raises CommandError."""
        self.decode(object)
        return msgspec.json.format(self._content, indent=2).decode()


class AdminClient:
    """The operators' port of a gateway. Every call raises CommandError, and none is sent twice."""

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
        **query: Any,
    ) -> AdminResponse:
        """Call `/admin/v1` and the parts of a path, with a JSON body and a query, for an answer of a media type.

        With a `version` it is refused if there is a newer one.
        """
        for part in path:
            if part in {"", ".", ".."} or "/" in part:
                # However it is quoted, a server takes it for another path.
                raise ProblemError(NOT_FOUND, f"gateway: nothing has the name {single_line(part)!r}")
        address = "/".join(["/admin/v1", *(quote(each, safe="") for each in path)])
        content = None if body is None else msgspec.json.encode(body)
        headers = {"Accept": accept} | ({} if body is None else {"Content-Type": _JSON_TYPE})
        headers |= {} if version is None else {"If-Match": version}
        try:
            response = self._http.request(method, address, content=content, headers=headers, params=query)
        except httpx2.RequestError as error:
            raise self._map_transport_error(method, error) from None
        if (
            response.is_success
            and accept != _JSON_TYPE
            and response.headers.get("content-type", "").partition(";")[0] != accept
        ):
            raise _unexpected_response(self._url, f"it has no {accept}")
        if response.is_success:
            return AdminResponse(self._url, response.content, response.headers.get("etag"))
        try:
            problem = msgspec.json.decode(response.content, type=ProblemDocument)
        except msgspec.DecodeError:
            raise _unexpected_response(self._url, f"HTTP {response.status_code}") from None
        raise ProblemError(response.status_code, str(problem))

    def _map_transport_error(self, method: str, error: httpx2.RequestError) -> CommandError:
        why = single_line(str(error)) or type(error).__name__
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            hint = "Start it, or name its operators' port with --url."
            return CommandError(f"gateway: no gateway answers at {self._url}: {why}. {hint}")
        hint = "" if method == "GET" else " It may have been done all the same: look before you repeat it."
        return CommandError(f"gateway: no answer came from {self._url}: {why}.{hint}")


def with_admin_client(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the operators' port as its first argument, and the option that says where it is."""

    @click.option("--url", help="The operators' port.  [default: as GATEWAY_OPS_HOST and GATEWAY_OPS_PORT say]")
    @functools.wraps(command)
    def with_port(*, url: str | None, **arguments: Any) -> None:
        with open_admin_client(url) as port:
            command(port, **arguments)

    return with_port


@contextmanager
def open_admin_client(url: str | None) -> Iterator[AdminClient]:
    """The operators' port at `url`, or where the settings say it is, with the operators' token. Raises CommandError."""
    settings = load_settings()
    base = (url or _admin_url(settings)).rstrip("/")
    headers = {"Authorization": f"Bearer {_read_admin_token(settings)}"}
    try:
        parse_http_url(base)
        # A proxy out of the environment would be handed the token.
        http = httpx2.Client(base_url=base, headers=headers, timeout=_HTTP_TIMEOUT, trust_env=False)
    except (ValueError, httpx2.InvalidURL):
        raise CommandError(f"gateway: {single_line(base)} is no address such as http://127.0.0.1:8081") from None
    with http:
        yield AdminClient(base, http)


def _admin_url(settings: Settings) -> str:
    if not settings.ops_port:
        raise CommandError("gateway: GATEWAY_OPS_PORT is 0, so that nobody knows which it became: use --url")
    host = _LOOPBACK_BY_WILDCARD.get(settings.ops_host, settings.ops_host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.ops_port}"


def _read_admin_token(settings: Settings) -> str:
    """The operators' token: as set, or the one that a gateway in development made for itself."""
    if settings.admin_token:
        return settings.admin_token
    file = settings.data_dir / "admin.token"
    try:
        return parse_printable(Path(file).read_text().strip())
    except (OSError, ValueError):
        raise CommandError(
            f"gateway: there is no operators' token: set GATEWAY_ADMIN_TOKEN or GATEWAY_ADMIN_TOKEN_FILE "
            f"(a gateway in development keeps its own in {file})"
        ) from None


def _unexpected_response(url: str, why: str) -> CommandError:
    return CommandError(f"gateway: what answers at {url} is no operators' port of this version ({why})")
