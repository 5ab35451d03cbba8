"""Overrides the Redis server's time for the gateways of a key prefix.

Once installed, scripts and commands read the time in milliseconds from a key instead, if that key exists, or add the
seconds in it to the time. Run as a module, this is the command `gateway` with the override installed.
"""

from __future__ import annotations

import runpy
from typing import Any

from service.storage import redis
from service.storage.redis import Keys, parse_server_time

_TIME_CALL = "redis.call('TIME')"
_TIME_OVERRIDE = f"""(function()
  local set = redis.call('GET', KEYS[1] .. ':server')
  local time = {_TIME_CALL}
  if set and string.sub(set, 1, 1) == '+' then
    time[1] = time[1] + tonumber(string.sub(set, 2))
  elseif set then
    time = {{math.floor(set / 1000), set % 1000 * 1000}}
  end
  return {{tonumber(time[1]), tonumber(time[2])}}
end)()"""


class _PatchedScripts:
    """A folder of scripts, or one of them, whose source reads the time from the key."""

    def __init__(self, place: Any) -> None:
        self._path = place

    def __truediv__(self, name: str) -> _PatchedScripts:
        return _PatchedScripts(self._path / name)

    def read_text(self, encoding: str) -> str:
        text: str = self._path.read_text(encoding)
        return text.replace(_TIME_CALL, _TIME_OVERRIDE)


def install_server_time() -> None:
    folder: Any = redis._LUA_FOLDER
    if not isinstance(folder, _PatchedScripts):
        redis._LUA_FOLDER = _PatchedScripts(folder)  # type: ignore[assignment]
        time = property(lambda keys: ("EVAL", f"return {_TIME_OVERRIDE}", 1, keys.clock))
        Keys.server_time_command = time  # type: ignore[assignment]


async def set_server_time(client: Any, keys: Keys, milliseconds: int) -> None:
    await client.set(keys.clock + ":server", milliseconds)


async def shift_server_time(client: Any, keys: Keys, seconds: int) -> None:
    await client.set(keys.clock + ":server", f"+{seconds}")


async def read_server_time(client: Any, keys: Keys) -> int:
    return parse_server_time(await client.execute_command(*keys.server_time_command))


if __name__ == "__main__":
    install_server_time()
    runpy.run_module("service", run_name="__main__", alter_sys=True)
