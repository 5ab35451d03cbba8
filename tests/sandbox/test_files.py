"""Artifacts over HTTP."""

from __future__ import annotations

import httpx2
import pytest

from service.sandbox.app import RunningSandbox
from service.sandbox.faults import Behaviour, Fault
from tests.sandbox.client import SandboxClient


@pytest.fixture
async def urls(sandbox: RunningSandbox, client: SandboxClient) -> dict[str, str]:
    task_id = await client.submit_accepted("submit_vector_task")
    await sandbox.control.wait_until_idle()
    answer = await client.check(task_id)
    return {"image/png": answer["images_url"], "image/svg+xml": answer["vector_url"]}


@pytest.mark.parametrize("content_type", ["image/png", "image/svg+xml"])
async def test_complete_file(client: SandboxClient, urls: dict[str, str], content_type: str) -> None:
    """A file has type and length, and HEAD returns the same without a body."""
    url = urls[content_type]
    response = await client.http.get(url)
    head = await client.http.head(url)
    assert response.status_code == head.status_code == 200
    assert response.headers["content-type"] == head.headers["content-type"] == content_type
    assert int(head.headers["content-length"]) == len(response.content) > 0
    assert head.content == b""


@pytest.mark.parametrize(
    ("header", "first", "end"),
    [
        ("0-0", 0, 1),
        ("5-9", 5, 10),
        ("5-", 5, None),
        ("-7", -7, None),
        ("0-999999999", 0, None),
        ("-999999999", 0, None),
    ],
)
async def test_range(client: SandboxClient, urls: dict[str, str], header: str, first: int, end: int | None) -> None:
    """A range gets 206 with its bytes and position."""
    content = (await client.http.get(urls["image/png"])).content
    response = await client.http.get(urls["image/png"], headers={"range": f"bytes={header}"})
    assert response.status_code == 206
    assert response.content == content[first:end]
    start = content.index(response.content) if first != -7 else len(content) - 7
    assert response.headers["content-range"] == f"bytes {start}-{start + len(response.content) - 1}/{len(content)}"


@pytest.mark.parametrize("header", ["999999999-", "9-5", "-0", "-"])
async def test_unsatisfiable_range(client: SandboxClient, urls: dict[str, str], header: str) -> None:
    """A range beyond the file gets 416 with the file's length."""
    length = (await client.http.head(urls["image/png"])).headers["content-length"]
    response = await client.http.get(urls["image/png"], headers={"range": f"bytes={header}"})
    assert response.status_code == 416
    assert response.headers["content-range"] == f"bytes */{length}"


async def test_unsupported_range(client: SandboxClient, urls: dict[str, str]) -> None:
    """Other units, several ranges, and a range of another version get the complete file."""
    for headers in ({"range": "lines=1-2"}, {"range": "bytes=0-1,4-5"}, {"range": "bytes=0-1", "if-range": '"old"'}):
        assert (await client.http.get(urls["image/png"], headers=headers)).status_code == 200


async def test_range_of_the_same_version(client: SandboxClient, urls: dict[str, str]) -> None:
    etag = (await client.http.head(urls["image/png"])).headers["etag"]
    headers = {"range": "bytes=0-1", "if-range": etag}
    assert (await client.http.get(urls["image/png"], headers=headers)).status_code == 206


@pytest.mark.parametrize("name", ["grid.png", "input", "../../sandbox.sqlite3", "%2e%2e/input", ""])
async def test_only_results_are_served(client: SandboxClient, urls: dict[str, str], name: str) -> None:
    folder = urls["image/png"].rpartition("/")[0]
    assert (await client.http.get(f"{folder}/{name}")).status_code == 404


async def test_url_follows_the_client(client: SandboxClient, urls: dict[str, str]) -> None:
    """Result URLs have the host that the client used."""
    task_id = urls["image/png"].split("/")[-2]
    response = await client.http.post(
        "/api/check_task_status",
        data={"user_key": "key", "task_id": task_id},
        headers={"host": "upstream.example:81"},
    )
    assert response.json()["images_url"] == f"http://upstream.example:81/files/{task_id}/image.png"


async def test_faults_of_files(sandbox: RunningSandbox, client: SandboxClient, urls: dict[str, str]) -> None:
    """A file can be cut or replaced by a page once, and is complete afterwards."""
    faults = (
        Fault(on="file", times=1, reply="cut"),
        Fault(on="file", times=1, reply="page", when="before", status=503),
    )
    await sandbox.control.set_behaviour(Behaviour(faults=faults))
    with pytest.raises(httpx2.RemoteProtocolError):
        await client.http.get(urls["image/png"])
    assert (await client.http.get(urls["image/png"])).status_code == 503
    assert (await client.http.get(urls["image/png"])).status_code == 200
    served = [entry.outcome for entry in await sandbox.control.list_requests() if entry.operation == "file"]
    assert served == ["served", "not_processed", "served"]


async def test_page_instead_of_a_file(sandbox: RunningSandbox, client: SandboxClient, urls: dict[str, str]) -> None:
    """A page in place of an existing file is recorded as served."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(on="file", reply="page", status=500),)))
    assert (await client.http.get(urls["image/svg+xml"])).status_code == 500
    assert (await sandbox.control.list_requests())[-1].outcome == "served"
