"""Redis topologies on real servers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from redis import Redis

from tests.support.valkey import Valkey, reserve_port, run_valkey


@dataclass(frozen=True)
class RunningStore:
    """A topology: the URL for clients, and the server that stores the data."""

    url: str
    server: Valkey

    def execute(self, *command: str) -> Any:
        """Run a command on the server, bypassing the clients under test."""
        with Redis(unix_socket_path=str(self.server.socket_path)) as client:
            return client.execute_command(*command)


def pause_unless(condition: bool | None) -> bool:
    if not condition:
        time.sleep(0.01)
    return not condition


@contextmanager
def run_cluster(*options: str) -> Iterator[RunningStore]:
    own = ("--cluster-enabled", "yes", "--cluster-port", str(reserve_port()), "--cluster-node-timeout", "1000")
    with run_valkey(*own, *options, port=reserve_port()) as server:
        store = RunningStore(f"redis+cluster://127.0.0.1:{server.port},127.0.0.1:1", server)
        store.execute("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        while pause_unless(b"cluster_state:ok" in store.execute("CLUSTER", "INFO")):
            pass
        yield store


@contextmanager
def run_sentinel(primary: int, *options: str) -> Iterator[Valkey]:
    monitor = f"sentinel monitor main 127.0.0.1 {primary} 1\n"
    with run_valkey("--sentinel", *options, port=reserve_port(), config=monitor) as watching:
        yield watching


@contextmanager
def run_with_sentinel() -> Iterator[RunningStore]:
    with run_valkey(port=reserve_port()) as server, run_sentinel(server.port) as watching:
        yield RunningStore(f"redis+sentinel://127.0.0.1:1,127.0.0.1:{watching.port}/main", server)


@contextmanager
def run_single() -> Iterator[RunningStore]:
    with run_valkey(port=reserve_port()) as server:
        yield RunningStore(f"redis://127.0.0.1:{server.port}", server)


@contextmanager
def run_on_socket() -> Iterator[RunningStore]:
    with run_valkey() as server:
        yield RunningStore(server.url, server)
