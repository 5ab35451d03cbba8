from __future__ import annotations

from structlog.testing import capture_logs

from tests.cli.conftest import Shell


async def test_reset(shell: Shell) -> None:
    """A reset prints and logs the offset of the ledger's clock; afterwards it is zero."""
    await shell.gateway.submit()
    await shell.gateway.advance(-1_200)
    with capture_logs() as events:
        assert await shell.run_json("clock", "reset") == {"offset_seconds": 1_200}
    (event,) = [item for item in events if item["event"] == "clock.reset"]
    assert (event["seconds"], event["actor"]) == (1_200, "operator at 127.0.0.1")
    assert await shell.run_json("clock", "reset") == {"offset_seconds": 0}
    assert "0 s ahead" in (await shell.run("clock", "reset")).stdout
