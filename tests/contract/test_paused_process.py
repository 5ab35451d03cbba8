"""A process that was stopped for longer than its timeouts reads what has arrived before it times out."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from service.usecases.ports import SubmitOutcome
from tests.contract.scripted_server import ACCEPTED_RESPONSE, Connection, run_server
from tests.process.gateway import is_alive

LIMIT_SECONDS = 0.4
PROGRAM = f"""
import sys, uvloop
from service.clients import http
from tests.contract.client import open_caller

async def main(url):
    for http.READ_SECONDS, seconds in (({LIMIT_SECONDS}, 30), (30, {LIMIT_SECONDS})):
        async with open_caller(url) as caller:
            print((await caller.submit(seconds=seconds)).outcome)

uvloop.run(main(sys.argv[1]))
"""


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "T"


async def test_response_during_a_pause() -> None:
    """A response that arrived while the process was stopped counts, whatever timeout has passed."""
    child: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def stop_and_reply(connection: Connection) -> None:
        await connection.receive()
        pid = await child
        os.kill(pid, signal.SIGSTOP)
        while not is_stopped(pid):
            await asyncio.sleep(0)
        await connection.send(ACCEPTED_RESPONSE)
        await asyncio.sleep(2 * LIMIT_SECONDS)  # past the timeout, while nothing can be read
        os.kill(pid, signal.SIGCONT)
        await connection.wait_closed()

    async with run_server(stop_and_reply) as peer:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROGRAM, peer.url), stdout=asyncio.subprocess.PIPE
        )
        child.set_result(process.pid)
        try:
            printed, _ = await process.communicate()
        finally:
            if is_alive(process.pid):
                process.kill()
    assert (printed.decode().split(), len(peer.requests)) == ([SubmitOutcome.ACCEPTED] * 2, 2)
