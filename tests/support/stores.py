"""Stores of every kind that a URL can name, each on real servers of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from redis import Redis

from tests.support.valkey import Valkey, free_port, running


@dataclass(frozen=True)
class Store:
    """A store of some kind: the URL it is known by, and the server that holds its data."""

    url: str
    server: Valkey

    def ask(self, *command: str) -> Any:
        """What the server itself answers, past the clients under test."""
        with Redis(unix_socket_path=str(self.server.path)) as client:
            return client.execute_command(*command)


def until(condition: bool | None) -> bool:
    """Whether a condition that is looked at in a loop has still to come true; a moment passes if so."""
    if not condition:
        time.sleep(0.01)
    return not condition


@contextmanager
def cluster(*options: str) -> Iterator[Store]:
    own = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--cluster-node-timeout", "1000")
    with running(*own, *options, port=free_port()) as server:
        store = Store(f"redis+cluster://127.0.0.1:{server.port},127.0.0.1:1", server)
        store.ask("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        while until(b"cluster_state:ok" in store.ask("CLUSTER", "INFO")):
            pass
        yield store


@contextmanager
def sentinel(primary: int, *options: str) -> Iterator[Valkey]:
    monitor = f"sentinel monitor main 127.0.0.1 {primary} 1\n"
    with running("--sentinel", *options, port=free_port(), config=monitor) as watching:
        yield watching


@contextmanager
def watched() -> Iterator[Store]:
    with running(port=free_port()) as server, sentinel(server.port) as watching:
        yield Store(f"redis+sentinel://127.0.0.1:1,127.0.0.1:{watching.port}/main", server)


@contextmanager
def single() -> Iterator[Store]:
    with running(port=free_port()) as server:
        yield Store(f"redis://127.0.0.1:{server.port}", server)


@contextmanager
def unix() -> Iterator[Store]:
    with running() as server:
        yield Store(server.url, server)
