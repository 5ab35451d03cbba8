"""The demo as a whole, against a fake gateway."""

import asyncio
import io
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from litestar import Response

from service.cli import main
from service.demo.run import JOBS, DemoOptions, run_demo
from tests.demo.fake_gateway import TOKEN, FakeGateway, problem_response
from tests.demo.results import SVG, good_results

ALL = "upscale, vectorize, face-enhance, seamless"


def make_options(gateway: FakeGateway, folder: Path, **changes: Any) -> DemoOptions:
    """Return valid options with changes."""
    usual: dict[str, Any] = {
        "base_url": gateway.address,
        "token": TOKEN,
        "folder": folder / "results",
        "output": io.StringIO(),
        "timeout_seconds": 20.0,
    }
    return DemoOptions(**usual | changes)


async def run_and_capture(chosen: DemoOptions) -> tuple[int, list[str]]:
    """Run the demo; returns exit code and output lines, durations below 10 s shown as 0.0."""
    code = await run_demo(chosen)
    assert isinstance(chosen.output, io.StringIO)
    return code, re.sub(r" \d\.\d  ", " 0.0  ", chosen.output.getvalue()).splitlines()


async def test_table(gateway: FakeGateway, tmp_path: Path) -> None:
    """Successful tasks give a table of costs and results, and exit code 0."""
    gateway.costs["vectorize"] = {"count": 0, "money": 0.5, "basis": "estimated"}
    gateway.costs["seamless"] = {"count": 1, "money": 0, "basis": "unknown"}
    code, lines = await run_and_capture(make_options(gateway, tmp_path))
    assert code == 0
    assert lines[-8:] == [
        "kind          state      seconds  cost    file                    pixels     check",
        "upscale       succeeded      0.0  1 use   upscale-image.png       720 x 480  2.0 times as wide and high",
        "vectorize     succeeded      0.0  ~¥0.50  vectorize-vector.svg    320 x 320  2 paths",
        "face-enhance  succeeded      0.0  1 use   face-enhance-image.jpg  240 x 240  changed, not smaller",
        "seamless      succeeded      0.0  ?       seamless-image.png      256 x 256  edges meet (seam 0.0, was 3.7)",
        "                                          seamless-grid.webp      512 x 512  larger than the tile",
        "",
        f"All results are valid. They are in {tmp_path / 'results'}",
    ]


async def test_files(gateway: FakeGateway, tmp_path: Path) -> None:
    """Every result is written unchanged, under a name with its kind and type."""
    await run_and_capture(make_options(gateway, tmp_path))
    results = good_results()
    assert {file.name: file.read_bytes() for file in (tmp_path / "results").iterdir()} == {
        "upscale-image.png": results["upscale"]["image"][1],
        "vectorize-vector.svg": SVG,
        "face-enhance-image.jpg": results["face-enhance"]["image"][1],
        "seamless-image.png": results["seamless"]["image"][1],
        "seamless-grid.webp": results["seamless"]["grid"][1],
    }


async def test_submissions(gateway: FakeGateway, tmp_path: Path) -> None:
    """Each kind is submitted once, with its own image and options and the token."""
    await run_and_capture(make_options(gateway, tmp_path))
    sent = {kind: (s.filename, s.content, s.fields) for kind, s in gateway.submissions.items()}
    assert sent == {job.kind: (job.image_name, job.read_image(), job.options) for job in JOBS}
    assert set(gateway.tokens.values()) == {f"Bearer {TOKEN}"}


async def test_changes(gateway: FakeGateway, tmp_path: Path) -> None:
    """A log shows each state of a task once, in order."""
    gateway.states["upscale"] = ["queued", "queued", "running", "succeeded"]
    _, lines = await run_and_capture(make_options(gateway, tmp_path))
    states = [line for line in lines if line.startswith("upscale: ")]
    assert states == [f"upscale: {state}" for state in ("submitting", "queued", "running", "succeeded")]


async def test_poll_interval(gateway: FakeGateway, tmp_path: Path) -> None:
    """Polls follow `Retry-After`."""
    gateway.retry_after = "1"
    await run_and_capture(make_options(gateway, tmp_path))
    polls = gateway.polls["upscale"]
    assert [later - sooner >= 0.99 for sooner, later in pairwise(polls)] == [True, True]


async def test_terminal(gateway: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the states are shown in place, and the table replaces them."""
    output = io.StringIO()
    monkeypatch.setattr(output, "isatty", lambda: True)
    assert await run_demo(make_options(gateway, tmp_path, output=output)) == 0
    progress, erased, report = output.getvalue().rpartition("\x1b[?25h\r" + "\x1b[1A\x1b[2K" * len(JOBS))
    assert all(re.search(rf"{job.kind} +succeeded", progress) for job in JOBS)
    assert erased
    assert report.startswith("kind          state      seconds  cost")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ({"title": "Rejected", "detail": "too\nsmall", "status": 502}, "Rejected: too small"),
        ("图片过小", "图片过小"),
        (None, "no reason is given"),
        ({"code": 7}, "no reason is given"),
    ],
)
async def test_failed(gateway: FakeGateway, tmp_path: Path, error: object, reason: str) -> None:
    """A failed task is shown with its reason beside the other results; exit code 1."""
    gateway.states["face-enhance"] = ["running", "failed"]
    gateway.error = error
    code, lines = await run_and_capture(make_options(gateway, tmp_path))
    assert code == 1
    assert "face-enhance  failed         0.0  1 use" in lines
    assert lines[-1] == f"face-enhance: the task failed: {reason}"


async def test_wrong(gateway: FakeGateway, tmp_path: Path) -> None:
    """A result that violates its kind's promise is named; exit code 1."""
    gateway.results["upscale"]["image"] = ("image/jpeg", JOBS[0].read_image())
    code, lines = await run_and_capture(make_options(gateway, tmp_path))
    assert code == 1
    assert "upscale       succeeded      0.0  1 use  upscale-image.jpg       360 x 240  wrong, see below" in lines
    assert lines[-1] == "upscale: the image is 360 x 240, not larger than the original, 360 x 240"


async def test_unknown_type(gateway: FakeGateway, tmp_path: Path) -> None:
    """A result of unexpected type is stored under a neutral name."""
    gateway.results["upscale"]["image"] = ("text/html", b"<html></html>")
    code, lines = await run_and_capture(make_options(gateway, tmp_path))
    assert code == 1
    assert (tmp_path / "results" / "upscale-image.bin").read_bytes() == b"<html></html>"
    assert lines[-1] == "upscale: the image is XML, but no SVG"


async def test_no_gateway(gateway: FakeGateway, tmp_path: Path) -> None:
    """One line reports that no gateway answers, and how to start one."""
    code, lines = await run_and_capture(make_options(gateway, tmp_path, base_url="http://127.0.0.1:1/"))
    assert (code, lines) == (1, ["Can't connect to http://127.0.0.1:1 — start a gateway with `make run`"])


@pytest.mark.parametrize("address", ["127.0.0.1:8080", "http://a:b", "ftp://127.0.0.1"])
async def test_invalid_url(gateway: FakeGateway, tmp_path: Path, address: str) -> None:
    code, lines = await run_and_capture(make_options(gateway, tmp_path, base_url=address))
    assert (code, lines) == (1, [f"{address} is not the address of a gateway"])


async def test_unauthenticated(gateway: FakeGateway, tmp_path: Path) -> None:
    """A rejected token is reported once, before any submission."""
    gateway.problems["quota"] = problem_response(401, "Not authenticated", "Send a valid token.")
    code, lines = await run_and_capture(make_options(gateway, tmp_path))
    assert (code, lines) == (1, ["Not authenticated: Send a valid token."])
    assert not gateway.submissions


@pytest.mark.parametrize(
    ("status", "title", "detail"),
    [
        (402, "Balance exhausted", "The account is checked again in 60 s."),
        (429, "Quota exceeded", "The day's quota is used up."),
    ],
)
async def test_refused(gateway: FakeGateway, tmp_path: Path, status: int, title: str, detail: str) -> None:
    """A refusal that all tasks share is shown once, with title and detail."""
    gateway.problems |= {job.kind: problem_response(status, title, detail) for job in JOBS}
    code, lines = await run_and_capture(make_options(gateway, tmp_path))
    assert code == 1
    assert "vectorize     no task      0.0  ?" in lines
    assert lines[-1] == f"{ALL}: {title}: {detail}"


async def test_not_a_gateway(gateway: FakeGateway, tmp_path: Path) -> None:
    """Errors without problem documents suggest another server."""
    gateway.problems["quota"] = Response(b"<html>", status_code=404)
    code, lines = await run_and_capture(make_options(gateway, tmp_path))
    assert (code, lines) == (1, ["HTTP 404 without a problem document: is this a gateway?"])


async def test_broken_connection(tmp_path: Path) -> None:
    """A connection that breaks before the response is not reported as an absent gateway."""

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        chosen = make_options(FakeGateway(address=f"http://127.0.0.1:{port}"), tmp_path)
        code, lines = await run_and_capture(chosen)
    assert code == 1
    assert [line.startswith("The connection to the gateway broke: ") for line in lines] == [True]


async def test_lost_while_running(gateway: FakeGateway, tmp_path: Path) -> None:
    """A task that can no longer be read keeps its last state."""
    gateway.problems["read"] = problem_response(503, "Overloaded", "Come back later.")
    code, lines = await run_and_capture(make_options(gateway, tmp_path))
    assert code == 1
    assert "seamless      queued      0.0  ?" in lines
    assert lines[-1] == f"{ALL}: Overloaded: Come back later."


async def test_timeout(gateway: FakeGateway, tmp_path: Path) -> None:
    """A timeout reports that the task continues at the gateway."""
    gateway.states["upscale"] = ["running"]
    code, lines = await run_and_capture(make_options(gateway, tmp_path, timeout_seconds=1.5))
    assert code == 1
    assert "upscale: not done after 1.5 s; the gateway continues task_upscale" in lines


async def test_timeout_of_a_submission(gateway: FakeGateway, tmp_path: Path) -> None:
    """A submission without a response in time reports no task."""
    gateway.blocked_kind = "upscale"
    code, lines = await run_and_capture(make_options(gateway, tmp_path, timeout_seconds=1.5))
    gateway.unblock.set()
    assert code == 1
    assert "upscale: not done after 1.5 s" in lines


async def test_unusable_folder(gateway: FakeGateway, tmp_path: Path) -> None:
    """An unusable folder is reported before any submission."""
    (tmp_path / "results").write_text("a file")
    code, lines = await run_and_capture(make_options(gateway, tmp_path))
    assert (code, lines) == (1, [f"The results can't be written to {tmp_path / 'results'}: File exists"])
    assert not gateway.submissions


async def test_unwritable_file(gateway: FakeGateway, tmp_path: Path) -> None:
    """A result that cannot be written is reported, and the others are written."""
    (tmp_path / "results" / "upscale-image.png").mkdir(parents=True)
    code, lines = await run_and_capture(make_options(gateway, tmp_path))
    assert code == 1
    assert lines[-1].startswith("upscale: the results cannot be written: ")
    assert (tmp_path / "results" / "seamless-grid.webp").exists()


async def test_interrupted(gateway: FakeGateway, tmp_path: Path) -> None:
    """An interrupted demo names exactly the tasks that continue, and raises CancelledError."""
    gateway.states |= {job.kind: ["running"] for job in JOBS} | {"vectorize": ["succeeded"]}
    chosen = make_options(gateway, tmp_path)
    running = asyncio.create_task(run_demo(chosen))
    fetched = "/v1/tasks/task_vectorize/artifacts/vector"
    await gateway.wait_until(lambda: sum(len(polls) > 1 for polls in gateway.polls.values()) == 3)
    await gateway.wait_until(lambda: fetched in gateway.tokens)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert isinstance(chosen.output, io.StringIO)
    assert chosen.output.getvalue().splitlines()[-1] == (
        "Interrupted. The gateway continues: task_upscale, task_face-enhance, task_seamless"
    )


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the image library the command prints one line that names the extra."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    result = CliRunner().invoke(main, ["demo"])
    assert (result.exit_code, result.stderr) == (1, "gateway: the demo needs PIL: install imaging-gateway[local]\n")
