"""The demo's HTTP client."""

import time
from email.utils import formatdate

import pytest
from litestar import Response

from service.demo.client import Artifact, GatewayError, open_client
from tests.demo.fake_gateway import TOKEN, FakeGateway, problem_response
from tests.demo.results import SVG


@pytest.mark.parametrize(
    ("retry_after", "least", "most"),
    [
        ("3", 3, 3),
        ("0", 0.1, 0.1),
        (None, 1, 1),
        ("soon", 1, 1),
        (formatdate(time.time() + 86_400, usegmt=True), 80_000, 86_400),
        (formatdate(0, usegmt=True), 0.1, 0.1),
    ],
    ids=["seconds", "none", "absent", "unreadable", "a date to come", "a date gone by"],
)
async def test_pause(gateway: FakeGateway, retry_after: str | None, least: float, most: float) -> None:
    """The pause follows `Retry-After`, in seconds or as a date, and is never zero."""
    gateway.retry_after = retry_after
    async with open_client(gateway.address, TOKEN, 5) as client:
        sighting = await client.get_task("task_upscale")
    assert least <= sighting.pause_seconds <= most


async def test_fetch(gateway: FakeGateway) -> None:
    """A result is fetched through the gateway with the token."""
    path = "/v1/tasks/task_vectorize/artifacts/vector"
    async with open_client(gateway.address, TOKEN, 5) as client:
        file = await client.fetch_artifact(Artifact("vector", path))
    assert (file.content, file.content_type) == (SVG, "image/svg+xml")
    assert gateway.tokens == {path: f"Bearer {TOKEN}"}


async def test_artifact_refused(gateway: FakeGateway) -> None:
    """The gateway's reason is shown."""
    gateway.problems["artifact"] = problem_response(502, "Invalid upstream response", "It is gone.")
    async with open_client(gateway.address, TOKEN, 5) as client:
        with pytest.raises(GatewayError, match=r"^Invalid upstream response: It is gone\.$"):
            await client.fetch_artifact(Artifact("vector", "/v1/tasks/task_vectorize/artifacts/vector"))


async def test_control_characters(gateway: FakeGateway) -> None:
    """Text of the gateway is shown on one line without control characters."""
    gateway.problems["quota"] = problem_response(503, "Overloaded", "Wait\n\x1b[2J a moment.")
    async with open_client(gateway.address, TOKEN, 5) as client:
        with pytest.raises(GatewayError) as caught:
            await client.ping()
    assert str(caught.value) == "Overloaded: Wait [2J a moment."


@pytest.mark.parametrize(
    "answer",
    [
        {"id": "task_1"},
        {"id": "task_1", "state": "succeeded", "artifacts": [{"name": "../../x", "href": "/a"}]},
        {"id": "task_1", "state": "succeeded", "artifacts": [{"name": "image", "href": "http://a/"}]},
        {"id": "task_1", "state": "succeeded", "artifacts": [{"name": "image", "href": "//a/"}]},
    ],
    ids=["no state", "a name that leaves the folder", "an address that leaves the gateway", "another such address"],
)
async def test_not_a_task(gateway: FakeGateway, answer: object) -> None:
    gateway.problems["read"] = Response(answer)
    async with open_client(gateway.address, TOKEN, 5) as client:
        with pytest.raises(GatewayError, match="The response is not a task: "):
            await client.get_task("task_1")
