"""The subset of `openssl` that OPERATIONS.md uses: `openssl rand -base64 N` and `openssl rand -hex N`."""

from __future__ import annotations

import base64
import secrets
import sys


def main() -> int:
    rand, form, number = sys.argv[1:]
    written = {"-base64": lambda data: base64.b64encode(data).decode(), "-hex": bytes.hex}
    if rand != "rand":
        raise SystemExit("openssl: only `rand` is known here")
    sys.stdout.write(written[form](secrets.token_bytes(int(number))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
