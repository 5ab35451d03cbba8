"""Lets a test say what time it is by the server's clock, for the gateways of a prefix.

A server's clock can't be set. Once this is installed, a key is read wherever a script or a command would ask for the
time: what a test wrote there, in milliseconds, is the time until it writes another one, and without it all is as usual.
Run as a module, this is the command `gateway`, for which the same holds.
"""

from __future__ import annotations

import runpy
from typing import Any

from service.storage import redis
from service.storage.redis import Keys, moment, server_time

_TIME = "redis.call('TIME')"
_READ = f"""(function()
  local set = redis.call('GET', KEYS[1] .. ':server')
  local time = set and {{math.floor(set / 1000), set % 1000 * 1000}} or {_TIME}
  return {{tonumber(time[1]), tonumber(time[2])}}
end)()"""


class _Sources:
    """A folder of scripts, or one of them, in which the time is read from that key."""

    def __init__(self, place: Any) -> None:
        self._place = place

    def __truediv__(self, name: str) -> _Sources:
        return _Sources(self._place / name)

    def read_text(self, encoding: str) -> str:
        text: str = self._place.read_text(encoding)
        return text.replace(_TIME, _READ)


def install() -> None:
    """Have the time of this process's ledgers read from that key."""
    folder: Any = redis._FOLDER
    if not isinstance(folder, _Sources):
        redis._FOLDER = _Sources(folder)  # type: ignore[assignment]
        time = property(lambda keys: ("EVAL", f"return {_READ}", 1, keys.clock))
        Keys.time = time  # type: ignore[method-assign,assignment]


async def set_time(client: Any, keys: Keys, milliseconds: int) -> None:
    """Let it be this time by the server's clock from now on."""
    await client.set(keys.clock + ":server", milliseconds)


async def read_time(client: Any, keys: Keys) -> int:
    """The server's time."""
    return server_time(await client.execute_command(*keys.time))


async def ledger_time(client: Any, keys: Keys) -> int:
    """The ledger's time."""
    last, offset = await client.mget(keys.clock, keys.clock_offset)
    return moment(last, offset, await client.execute_command(*keys.time)).now


if __name__ == "__main__":
    install()
    runpy.run_module("service", run_name="__main__", alter_sys=True)
