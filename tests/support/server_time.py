"""Lets a test say what time it is by the server's clock, for the gateways of a prefix.

A server's clock can't be set. Once this is installed, a key is read wherever a script or a command would ask for the
time: what a test wrote there, in milliseconds, is the time until it writes another one, and without it all is as usual.
Run as a module, this is the command `gateway`, for which the same holds.
"""

from __future__ import annotations

import runpy
from typing import Any

from service.storage import redis
from service.storage.redis import Keys, parse_ledger_time, parse_server_time

_TIME_CALL = "redis.call('TIME')"
_TIME_OVERRIDE = f"""(function()
  local set = redis.call('GET', KEYS[1] .. ':server')
  local time = set and {{math.floor(set / 1000), set % 1000 * 1000}} or {_TIME_CALL}
  return {{tonumber(time[1]), tonumber(time[2])}}
end)()"""


class _PatchedScripts:
    """A folder of scripts, or one of them, in which the time is read from that key."""

    def __init__(self, place: Any) -> None:
        self._path = place

    def __truediv__(self, name: str) -> _PatchedScripts:
        return _PatchedScripts(self._path / name)

    def read_text(self, encoding: str) -> str:
        text: str = self._path.read_text(encoding)
        return text.replace(_TIME_CALL, _TIME_OVERRIDE)


def install_server_time() -> None:
    """Have the time of this process's ledgers read from that key."""
    folder: Any = redis._LUA_FOLDER
    if not isinstance(folder, _PatchedScripts):
        redis._LUA_FOLDER = _PatchedScripts(folder)  # type: ignore[assignment]
        time = property(lambda keys: ("EVAL", f"return {_TIME_OVERRIDE}", 1, keys.clock))
        Keys.server_time_command = time  # type: ignore[method-assign,assignment]


async def set_server_time(client: Any, keys: Keys, milliseconds: int) -> None:
    """Let it be this time by the server's clock from now on."""
    await client.set(keys.clock + ":server", milliseconds)


async def read_server_time(client: Any, keys: Keys) -> int:
    """The server's time."""
    return parse_server_time(await client.execute_command(*keys.server_time_command))


async def read_ledger_time(client: Any, keys: Keys) -> int:
    """The ledger's time."""
    last, offset = await client.mget(keys.clock, keys.clock_offset)
    return parse_ledger_time(last, offset, await client.execute_command(*keys.server_time_command)).ledger_ms


if __name__ == "__main__":
    install_server_time()
    runpy.run_module("service", run_name="__main__", alter_sys=True)
