"""The names of everything the gateway keeps in Redis.

All begin with the prefix in braces, the hash tag of a Cluster: a settlement touches tenant, account, task and watch in
one script, so they have to live on one node. Several gateways can share a Redis under different prefixes.
"""

from __future__ import annotations


class Keys:
    """Builds keys under one prefix."""

    def __init__(self, prefix: str) -> None:
        self._root = f"{{{prefix}}}:"

    @property
    def data_version(self) -> str:
        """The version of all that is kept under the other keys."""
        return self._root + "version"

    @property
    def clock(self) -> str:
        """The ledger's time as a script last saw it, so that a failover can't step it back."""
        return self._root + "clock"

    @property
    def clock_offset(self) -> str:
        """By how much it was ahead of the server's time then, in tenths of a millisecond; only there while it is."""
        return self._root + "clock:offset"

    @property
    def time(self) -> tuple[str, ...]:
        """The command that reads the server's time."""
        return ("TIME",)

    @property
    def moment(self) -> tuple[tuple[str, ...], ...]:
        """The commands that read the ledger's time and the server's."""
        return ("GET", self.clock), ("GET", self.clock_offset), self.time

    @property
    def registry(self) -> str:
        """Accounts, tenants and tokens, in one hash with their version."""
        return self._root + "registry"

    @property
    def registry_channel(self) -> str:
        """Where a change of the registry is announced."""
        return self._root + "registry:changed"

    @property
    def leases(self) -> str:
        """The open reservations by the end of their lease."""
        return self._root + "leases"

    @property
    def watch(self) -> str:
        """The running tasks by the time of their next check."""
        return self._root + "watch"

    @property
    def claims(self) -> str:
        """The running tasks that a process checks just now, by the time when another one may."""
        return self._root + "claims"

    @property
    def changes_channel(self) -> str:
        """Where the changes of tasks are announced."""
        return self._root + "tasks:changed"

    def interest(self, reservation: str) -> str:
        """Says that somebody looked at a task lately. Without an id, how all of these keys begin."""
        return f"{self._root}interest:{reservation}"

    @property
    def receivers(self) -> str:
        """The receivers that something is to be delivered to, by the time when it is their turn."""
        return self._root + "receivers"

    @property
    def failed_deliveries(self) -> str:
        """The deliveries that were given up, by the time of that."""
        return self._root + "deliveries:failed"

    def delivery(self, reservation: str) -> str:
        """How the end of a task is told to its tenant. Without an id, how all of these keys begin."""
        return f"{self._root}delivery:{reservation}"

    def deliveries_due(self, receiver: str) -> str:
        """What waits to be delivered to a receiver, by when. Without one, how all of these keys begin."""
        return f"{self._root}deliveries:due:{receiver}"

    def deliveries_claimed(self, receiver: str) -> str:
        """What is delivered to a receiver just now, by the time when another process may. Without one, as above."""
        return f"{self._root}deliveries:claimed:{receiver}"

    def failing(self, receiver: str) -> str:
        """Says that a receiver failed lately. Without one, how all of these keys begin."""
        return f"{self._root}failing:{receiver}"

    def tenant(self, tenant: int) -> str:
        """A tenant's limits and counters. Ids are never reused, so neither are counters."""
        return f"{self._root}tenant:{tenant}"

    def account(self, account: int) -> str:
        """An account's floors, prices and figures."""
        return f"{self._root}account:{account}"

    def reservation(self, reservation: str) -> str:
        """One submission's reservation and outcome. Without an id, how all of these keys begin."""
        return f"{self._root}reservation:{reservation}"

    def idempotency(self, tenant: int, key: str) -> str:
        """What was first submitted under an idempotency key of a tenant. Without a key, how all of these begin."""
        return f"{self._root}idempotency:{tenant}:{key}"

    def usage(self, tenant: int, day: int | str) -> str:
        """What a tenant used on a day, counted from the epoch. With an empty day, how all of these keys begin."""
        return f"{self._root}usage:{tenant}:{day}"

    def task(self, reservation: str) -> str:
        """The task a submission became, by the id of its reservation: there is at most one.

        Without an id, how all of these keys begin.
        """
        return f"{self._root}task:{reservation}"

    def tasks(self, tenant: int) -> str:
        """A tenant's tasks by the time of their creation."""
        return f"{self._root}tasks:{tenant}"
