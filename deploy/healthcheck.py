"""The HEALTHCHECK of the image, which has no curl.

Sends a request to the operators' port, on which every role listens. Exits with 0 if it succeeds, otherwise 1.
"""

from __future__ import annotations

import sys
from http.client import HTTPConnection, HTTPException

from service.cli.common import load_settings

_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_SECONDS = 4.0


def main() -> int:
    """Send one request; returns the exit code."""
    settings = load_settings()
    host = _LOOPBACK_OF.get(settings.ops_host, settings.ops_host)
    connection = HTTPConnection(host, settings.ops_port, timeout=_SECONDS)
    try:
        connection.request("GET", "/healthz")
        return 0 if connection.getresponse().status == 200 else 1
    except (OSError, HTTPException):
        return 1


if __name__ == "__main__":
    sys.exit(main())
