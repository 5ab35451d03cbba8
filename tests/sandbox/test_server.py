"""The sandbox as a server: start, end, and several in one process."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading

import pytest

from service.sandbox.app import SandboxConfig, open_sandbox, serve
from service.sandbox.faults import Behaviour, Fault
from service.sandbox.store import AccountBalance
from tests.sandbox.client import open_client

CONFIG = SandboxConfig(accounts={"key": AccountBalance(9, 0)}, seconds=0)


async def test_sandboxes_share_a_process() -> None:
    """Several sandboxes run side by side, each with its own accounts and behaviour."""
    async with open_sandbox(CONFIG) as first, open_sandbox(CONFIG) as second:
        await first.control.set_account("key", AccountBalance(1, 0))
        await first.control.set_behaviour(Behaviour(faults=(Fault(reject="忙"),)))
        async with open_client(first.url) as client:
            assert (await client.submit()).json()["err_code"] == 1
        async with open_client(second.url) as client:
            assert (await client.submit()).json()["remaining_count"] == 8


async def test_closing_cuts_hanging_requests() -> None:
    """A sandbox closes at once although requests hang, are delayed, or keep their connection open."""
    threads = threading.active_count()
    faults = (Fault(times=1, reply="hang"), Fault(times=1, latency=3600), Fault(times=1))
    async with asyncio.timeout(10):
        async with open_sandbox(CONFIG) as sandbox, open_client(sandbox.url) as client:
            await sandbox.control.set_behaviour(Behaviour(seconds=3600, faults=faults))
            submits = [asyncio.ensure_future(client.submit()) for _ in faults]
            await asyncio.wait(submits, return_when=asyncio.FIRST_COMPLETED)
            await sandbox.control.wait_for_requests(lambda entries: len(entries) == len(faults))
        outcomes = await asyncio.gather(*submits, return_exceptions=True)
    assert sum(isinstance(outcome, BaseException) for outcome in outcomes) == 2
    assert threading.active_count() == threads


async def test_running_installs_no_signal_handlers() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with open_sandbox(CONFIG):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


async def test_port_can_be_chosen() -> None:
    """A sandbox listens on the given port, and fails if that is in use."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            async with open_sandbox(CONFIG, port=port):
                pass
    async with open_sandbox(CONFIG, port=port) as sandbox:
        assert sandbox.url == f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(("host", "named"), [("0.0.0.0", "127.0.0.1"), ("::1", "[::1]")])
async def test_url_can_be_called(host: str, named: str) -> None:
    """The printed URL is callable, whatever address is listened on."""
    async with open_sandbox(CONFIG, host) as sandbox, open_client(sandbox.url) as client:
        assert sandbox.url.startswith(f"http://{named}:")
        assert (await client.check("1"))["err_code"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_serving_ends_with_a_signal(number: signal.Signals) -> None:
    """As a process the sandbox prints its URL, and exits with 0 on a signal."""
    program = (
        "import asyncio\n"
        "from service.sandbox.app import SandboxConfig, serve\n"
        "asyncio.run(serve(SandboxConfig(), '127.0.0.1', 0, on_ready=lambda url: print(url, flush=True)))\n"
        "print('ended')\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", "-c", program, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert (await process.stdout.readline()).startswith(b"http://127.0.0.1:")
    process.send_signal(number)
    assert await process.communicate() == (b"ended\n", b"")
    assert process.returncode == 0


async def test_serving_ends_when_cancelled() -> None:
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(serve(CONFIG, "127.0.0.1", 0, on_ready=ready.set_result))
    url = await ready
    server.cancel()
    with pytest.raises(asyncio.CancelledError):
        await server
    with socket.create_server(("127.0.0.1", int(url.rpartition(":")[2]))):
        pass


async def test_no_image_library_before_the_first_image() -> None:
    """Starting imports none of the image libraries, which take most of a second."""
    program = (
        "import sys, service.sandbox.app\nprint({'cv2', 'numpy', 'PIL', 'vtracer', 'litestar'} & set(sys.modules))\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert output == b"set()\n"
