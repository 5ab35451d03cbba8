"""The subset of `curl` that OPERATIONS.md uses, for machines without it.

It starts fast since it imports only the standard library.
"""

from __future__ import annotations

import argparse
import sys
import uuid
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

_SECONDS = 90.0
_FAILED, _NOT_CONNECTED = 22, 7


def main() -> int:
    """Send one request and print the response; returns curl's exit code."""
    parser = argparse.ArgumentParser(prog="curl")
    for flag in ("-f", "-s", "-S"):
        parser.add_argument(flag, action="store_true", dest=f"flag_{flag[1]}")
    parser.add_argument("-o", dest="output")
    parser.add_argument("-w", dest="write_out")
    parser.add_argument("-X", dest="method")
    parser.add_argument("-d", dest="data")
    parser.add_argument("-F", dest="form")
    parser.add_argument("-H", dest="headers", action="append", default=[])
    parser.add_argument("url")
    arguments = parser.parse_args()
    headers = dict(header.split(": ", 1) for header in arguments.headers)
    body = arguments.data.encode() if arguments.data else None
    if arguments.form:
        name, _, path = arguments.form.partition("=@")
        body, headers["Content-Type"] = _encode_form(name, Path(path))
    try:
        request = Request(arguments.url, body, headers, method=arguments.method)  # noqa: S310 - as it was typed
        status, answer = _answer(request)
    except URLError as error:
        sys.stderr.write(f"curl: (7) {error.reason}\n")
        return _NOT_CONNECTED
    if arguments.flag_f and status >= 400:
        sys.stderr.write(f"curl: (22) The requested URL returned error: {status}\n")
        return _FAILED
    if arguments.output:
        Path(arguments.output).write_bytes(answer)
    else:
        sys.stdout.buffer.write(answer)
    sys.stdout.write((arguments.write_out or "").replace("%{http_code}", str(status)))
    return 0


def _answer(request: Request) -> tuple[int, bytes]:
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=_SECONDS) as answer:
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, error.read()


def _encode_form(name: str, path: Path) -> tuple[bytes, str]:
    """Encode a form with one file."""
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{path.name}"\r\n\r\n'
    return (
        head.encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode(),
        f"multipart/form-data; boundary={boundary}",
    )


if __name__ == "__main__":
    sys.exit(main())
