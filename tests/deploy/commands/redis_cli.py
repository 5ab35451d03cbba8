"""The subset of `redis-cli` that OPERATIONS.md uses, for machines without it.

It starts fast since it imports only the standard library.
"""

from __future__ import annotations

import argparse
import io
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

_SECONDS = 30.0


def main() -> int:
    """Send one command and print the reply, or save a snapshot; returns the exit code."""
    parser = argparse.ArgumentParser(prog="redis-cli")
    parser.add_argument("-u", dest="url")
    parser.add_argument("-p", dest="port", type=int, default=6379)
    parser.add_argument("--rdb", type=Path)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    address = urlsplit(arguments.url or f"redis://127.0.0.1:{arguments.port}")
    place = (str(address.hostname), address.port or 6379)
    with socket.create_connection(place, _SECONDS) as client, client.makefile("rwb") as stream:
        if arguments.rdb:
            arguments.rdb.write_bytes(_save_snapshot(stream))
            return 0
        parts = [word.encode() for word in arguments.words]
        stream.write(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts))
        stream.flush()
        return _print_reply(stream)


def _save_snapshot(stream: io.BufferedRWPair) -> bytes:
    """Receive a snapshot as a new replica does; the server sends empty lines until it is ready."""
    stream.write(b"SYNC\r\n")
    stream.flush()
    while not (line := stream.readline()).startswith(b"$"):
        if line.strip():
            raise SystemExit(line.decode())
    return stream.read(int(line[1:]))


def _print_reply(stream: io.BufferedRWPair) -> int:
    """Print the reply; a server that shuts down sends none."""
    line = stream.readline()
    if line.startswith(b"$"):
        sys.stdout.buffer.write(stream.read(max(0, int(line[1:]))) + b"\n")
    else:
        sys.stdout.buffer.write(line[1:])
    return int(line.startswith(b"-"))


if __name__ == "__main__":
    sys.exit(main())
