"""The demo against a real gateway and a scripted one, and its checks of results against the promise of their kind."""

import asyncio
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image, ImageFilter

from service.cli import main
from service.client import AsyncGatewayClient, Cost, GatewayError
from service.demo.run import JOBS, DemoOptions, format_cost, run_demo
from service.demo.verify import CheckResult, UnreadableError, open_image, read_image, seam_strength, verify_results
from tests.behaviour.clients import wait_until
from tests.behaviour.gateway_fixture import run_real_gateway
from tests.support.network import serve_app
from tests.support.valkey import Valkey

IMAGES = resources.files("service.demo") / "images"
SENT: dict[str, bytes] = {job.kind: job.read_image() for job in JOBS}
ALL = "upscale, vectorize, face-enhance, seamless"
TOKEN = "gw_demo"
SVG = (
    b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="320" height="320">'
    b'<path d="M0 0L9 9Z"/><path d="M5 5L9 0Z"/></svg>'
)
TIMES = dict.fromkeys(("created_at", "updated_at"), "2026-01-31T12:00:00Z")
Body = tuple[str, bytes]


@cache
def good_results() -> dict[str, dict[str, Body]]:
    """Return content types and bodies by kind and name."""
    images = {job.kind: Image.open(io.BytesIO(job.read_image())).convert("RGB") for job in JOBS}
    photo = images["upscale"]
    tile = tile_mirrored(images["seamless"].resize((128, 128)))
    return {
        "upscale": {"image": encode_image(photo.resize((photo.width * 2, photo.height * 2)), "PNG")},
        "vectorize": {"vector": ("image/svg+xml; charset=utf-8", SVG)},
        "face-enhance": {"image": encode_image(images["face-enhance"].filter(ImageFilter.MedianFilter(3)), "JPEG")},
        "seamless": {"image": encode_image(tile, "PNG"), "grid": encode_image(tile_mirrored(tile), "WEBP")},
    }


def tile_mirrored(image: Image.Image) -> Image.Image:
    """Tile the image with its reflections, so that opposite edges match."""
    tiled = Image.new(image.mode, (image.width * 2, image.height * 2))
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for x, part in ((0, image), (image.width, flipped)):
        tiled.paste(part, (x, 0))
        tiled.paste(part.transpose(Image.Transpose.FLIP_TOP_BOTTOM), (x, image.height))
    return tiled


def encode_image(image: Image.Image, form: str) -> Body:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return f"image/{form.lower()}", buffer.getvalue()


@dataclass
class ScriptedGateway:
    """An ASGI app with a task for each kind: `/v1/tasks/task_KIND`."""

    url: str = ""
    states: dict[str, list[str]] = field(
        default_factory=lambda: defaultdict(lambda: ["queued", "running", "succeeded"])
    )
    """The states that successive reads still return, beginning with the submission; the last one repeats."""
    results: dict[str, dict[str, Body]] = field(default_factory=lambda: deepcopy(good_results()))
    replies: dict[str, tuple[int, object]] = field(default_factory=dict)
    """Status and document in place of the ordinary response, by the end of the path."""
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further fields of tasks by kind."""
    retry_after: str | None = "0"
    paths: list[str] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert (b"authorization", f"Bearer {TOKEN}".encode()) in scope["headers"]
        while (await receive()).get("more_body"):
            pass
        path: str = scope["path"]
        self.paths.append(path)
        status, headers, body = self._respond(path.removeprefix("/v1/"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _respond(self, path: str) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        for end, (status, document) in self.replies.items():
            if path.endswith(end):
                return status, [], document if isinstance(document, bytes) else json.dumps(document).encode()
        match path.split("/"):
            case "tasks", task_id, "artifacts", name:
                content_type, body = self.results[task_id.removeprefix("task_")][name]
                return 200, [(b"content-type", content_type.encode())], body
            case "tasks", target:
                return self._read_task(target.removeprefix("task_"))
            case _:
                return 200, [], b'{"policies": [], "account": {"can_pay": true, "look_again_at": null}}'

    def _read_task(self, kind: str) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        states = self.states[kind]
        state = states.pop(0) if len(states) > 1 else states[0]
        links = [{"name": name, "href": f"/v1/tasks/task_{kind}/artifacts/{name}"} for name in self.results[kind]]
        task: dict[str, Any] = {"id": f"task_{kind}", "kind": kind, "state": state} | TIMES
        if state in {"succeeded", "failed"}:
            task["cost"] = {"count": 1, "money": 0, "basis": "observed"}
            task["artifacts"] = links if state == "succeeded" else []
        headers = [] if self.retry_after is None else [(b"retry-after", self.retry_after.encode())]
        return 200, headers, json.dumps(task | self.fields.get(kind, {})).encode()


@pytest.fixture
async def gateway() -> AsyncIterator[ScriptedGateway]:
    gateway = ScriptedGateway()
    async with serve_app(gateway) as gateway.url:
        yield gateway


def make_problem(title: str, detail: str) -> dict[str, object]:
    return {"type": "urn:x", "title": title, "detail": detail, "code": "x"}


async def run_and_capture(url: str, folder: Path, **changes: Any) -> tuple[int, list[str]]:
    """Run the demo; return exit code and output lines, durations below 10 s shown as 0.0."""
    output = io.StringIO()
    usual: dict[str, Any] = {"token": TOKEN, "folder": folder / "results", "output": output, "timeout_seconds": 120.0}
    code = await run_demo(DemoOptions(base_url=url, **usual | changes))
    return code, re.sub(r" \d\.\d  ", " 0.0  ", output.getvalue()).splitlines()


async def test_real_gateway(valkey: Valkey, tmp_path: Path) -> None:
    """One task of each kind is submitted with its options; its results are valid and stored."""
    async with run_real_gateway(valkey, GATEWAY_POLL_SECONDS="0.05") as gateway, gateway.services.run_jobs():
        code, lines = await run_and_capture(gateway.url, tmp_path, token=gateway.token)
        assert (code, lines[-1].endswith(str(tmp_path / "results"))) == (0, True), lines
        assert {path.name for path in (tmp_path / "results").iterdir()} >= {
            "upscale-image.png",
            "vectorize-vector.svg",
            "face-enhance-image.png",
            "seamless-image.png",
            "seamless-grid.png",
        }
        requests = [item for item in await gateway.upstream.control.list_requests() if item.operation == "submit"]
        fields = {request.path.rpartition("/")[2]: request.fields for request in requests}
        assert len(fields) == len(requests) == 4
        options = (fields["submit_task"]["upscale"], fields["submit_vector_task"]["color_count"])
        assert options == ("2.0", "5")

        await gateway.put_tenant(limits=[{"window": "day", "tasks": 0}])
        code, lines = await run_and_capture(gateway.url, tmp_path, token=gateway.token)
        assert code == 1
        assert "vectorize     no task      0.0  ?" in lines
        assert lines[-1].startswith(f"{ALL}: ")  # a refusal that all tasks share is shown once
        code, lines = await run_and_capture(gateway.url, tmp_path, token="unknown")
        assert (code, len(lines)) == (1, 1)  # before any submission


async def test_report(gateway: ScriptedGateway, tmp_path: Path) -> None:
    """Successful tasks give a table of costs and results, unchanged files and exit code 0; states are shown once."""
    gateway.states["upscale"] = ["queued", "queued", "running", "succeeded"]
    gateway.fields["vectorize"] = {"cost": {"count": 0, "money": 0.5, "basis": "estimated"}}
    gateway.fields["seamless"] = {"cost": {"count": 1, "money": 0, "basis": "unknown"}}
    code, lines = await run_and_capture(gateway.url, tmp_path)
    assert code == 0
    states = [line for line in lines if line.startswith("upscale: ")]
    assert states == [f"upscale: {state}" for state in ("submitting", "queued", "running", "succeeded")]
    assert lines[-8:-2] == [
        "kind          state      seconds  cost    file                    pixels     check",
        "upscale       succeeded      0.0  1 use   upscale-image.png       720 x 480  2.0 times as wide and high",
        "vectorize     succeeded      0.0  ~¥0.50  vectorize-vector.svg    320 x 320  2 paths",
        "face-enhance  succeeded      0.0  1 use   face-enhance-image.jpg  240 x 240  changed, not smaller",
        "seamless      succeeded      0.0  ?       seamless-image.png      256 x 256  edges meet (seam 0.0, was 3.7)",
        "                                          seamless-grid.webp      512 x 512  larger than the tile",
    ]
    assert (tmp_path / "results" / "vectorize-vector.svg").read_bytes() == SVG
    assert len(list((tmp_path / "results").iterdir())) == 5


async def test_json_report(gateway: ScriptedGateway, tmp_path: Path) -> None:
    """It has each task with its cost, files and errors, or the error of the connection; no progress is beside it."""
    gateway.states["face-enhance"] = ["running", "failed"]
    code, lines = await run_and_capture(gateway.url, tmp_path, as_json=True)
    report = json.loads("".join(lines))
    tasks = {task.pop("kind"): task for task in report.pop("tasks")}
    assert (code, report, tasks.keys()) == (1, {"valid": False, "error": None}, SENT.keys())
    assert set(tasks["upscale"]) == {"state", "seconds", "task", "cost", "files", "errors"}
    assert (tasks["upscale"]["files"], tasks["upscale"]["errors"]) == ({"image": "upscale-image.png"}, [])
    assert (tasks["face-enhance"]["state"], len(tasks["face-enhance"]["errors"])) == ("failed", 1)
    code, lines = await run_and_capture("http://127.0.0.1:1", tmp_path, as_json=True)
    report = json.loads("".join(lines))
    assert (code, report["valid"], report["tasks"], "make run" in report["error"]) == (1, False, [], True)


async def test_terminal(gateway: ScriptedGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the states are shown in place, and the table replaces them."""
    output = io.StringIO()
    monkeypatch.setattr(output, "isatty", lambda: True)
    assert (await run_and_capture(gateway.url, tmp_path, output=output))[0] == 0
    progress, erased, report = output.getvalue().rpartition("\x1b[?25h\r" + "\x1b[1A\x1b[2K" * len(JOBS))
    assert all(re.search(rf"{job.kind} +succeeded", progress) for job in JOBS)
    assert erased
    assert report.startswith("kind          state      seconds  cost")


@pytest.mark.parametrize(
    ("error", "reason"),
    [({"code": "task-failed", "detail": "too\nsmall"}, "too small"), (None, "no reason is given")],
)
async def test_failed_task(gateway: ScriptedGateway, tmp_path: Path, error: object, reason: str) -> None:
    """A failed task is shown with its reason beside the other results; exit code 1."""
    gateway.states["face-enhance"] = ["running", "failed"]
    gateway.fields["face-enhance"] = {"error": error}
    code, lines = await run_and_capture(gateway.url, tmp_path)
    assert code == 1
    assert "face-enhance  failed         0.0  1 use" in lines
    assert lines[-1] == f"face-enhance: the task failed: {reason}"


async def test_wrong_results(gateway: ScriptedGateway, tmp_path: Path) -> None:
    """A result that is not its kind's, or can't be written, is named; the others are written; exit code 1."""
    gateway.results["upscale"]["image"] = ("text/html", b"<html></html>")
    gateway.results["face-enhance"]["image"] = ("image/jpeg", JOBS[2].read_image())
    (tmp_path / "results" / "vectorize-vector.svg").mkdir(parents=True)
    code, lines = await run_and_capture(gateway.url, tmp_path)
    assert code == 1
    assert (tmp_path / "results" / "upscale-image.bin").read_bytes() == b"<html></html>"
    assert (tmp_path / "results" / "seamless-grid.webp").exists()
    assert sum(line.endswith("wrong, see below") for line in lines) == 2
    assert [line.split(":")[0] for line in lines[-3:]] == ["upscale", "vectorize", "face-enhance"]


async def test_no_gateway(gateway: ScriptedGateway, tmp_path: Path) -> None:
    """One line names the address; where nothing answers, it states how to start a gateway."""
    for address in ("http://127.0.0.1:1", "http://a:b", "ftp://127.0.0.1"):
        code, (line,) = await run_and_capture(address, tmp_path)
        assert (code, address in line, "make run" in line) == (1, True, address.endswith(":1"))
    gateway.replies["quota"] = (404, b"<html>")
    code, (line,) = await run_and_capture(gateway.url, tmp_path)
    assert (code, line.startswith("HTTP 404")) == (1, True)


async def test_unreadable_tasks(gateway: ScriptedGateway, tmp_path: Path) -> None:
    """A task that can no longer be read keeps its last state."""
    gateway.replies |= {f"task_{job.kind}": (503, make_problem("Overloaded", "Come back later.")) for job in JOBS}
    code, lines = await run_and_capture(gateway.url, tmp_path)
    assert code == 1
    assert "seamless      queued      0.0  ?" in lines
    assert lines[-1] == f"{ALL}: Overloaded: Come back later."


async def test_timeout(gateway: ScriptedGateway, tmp_path: Path) -> None:
    """A timeout names the task that the gateway continues."""
    gateway.states["vectorize"] = ["running"]
    code, lines = await run_and_capture(gateway.url, tmp_path, timeout_seconds=3)
    assert code == 1
    assert "vectorize: not done after 3 s; the gateway continues task_vectorize" in lines  # others may be late too


async def test_unusable_folder(gateway: ScriptedGateway, tmp_path: Path) -> None:
    """An unusable folder is reported before any submission."""
    (tmp_path / "results").write_text("a file")
    code, (line,) = await run_and_capture(gateway.url, tmp_path)
    assert (code, str(tmp_path / "results") in line, gateway.paths) == (1, True, [])


async def test_interrupted(gateway: ScriptedGateway, tmp_path: Path) -> None:
    """An interrupted demo names exactly the tasks that continue, and raises CancelledError."""
    gateway.states |= {str(job.kind): ["running"] for job in JOBS} | {"vectorize": ["succeeded"]}
    output = io.StringIO()
    running = asyncio.create_task(run_and_capture(gateway.url, tmp_path, output=output))
    continued = ("task_upscale", "task_face-enhance", "task_seamless")
    expected = {f"/v1/tasks/{task_id}" for task_id in continued} | {"/v1/tasks/task_vectorize/artifacts/vector"}
    await wait_until(lambda: expected <= set(gateway.paths))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert output.getvalue().splitlines()[-1].endswith(f": {', '.join(continued)}")


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    result = CliRunner().invoke(main, ["demo"])
    assert (result.exit_code, result.stderr) == (
        1,
        "gateway: the demo needs PIL: install the gateway's wheel with its extra [local]\n",
    )


async def test_hostile_responses(gateway: ScriptedGateway) -> None:
    """Text is shown on one line without control characters; no result leaves the folder, no request the gateway."""
    gateway.replies["quota"] = (503, make_problem("Overloaded", "Wait\n\x1b[2J a moment."))
    task: dict[str, Any] = {"id": "task_1", "kind": "upscale"} | TIMES
    async with AsyncGatewayClient(gateway.url, TOKEN) as client:
        with pytest.raises(GatewayError, match=r"^Overloaded: Wait \[2J a moment\.$"):
            await client.get_quota()
        for fields in (
            {},  # no state
            {"state": "succeeded", "artifacts": [{"name": "../../x", "href": "/a"}]},
            {"state": "succeeded", "artifacts": [{"name": "image", "href": "http://a/"}]},
            {"state": "succeeded", "artifacts": [{"name": "image", "href": "//a/"}]},
        ):
            gateway.replies["task_1"] = (200, task | fields)
            with pytest.raises(GatewayError, match="The response is not a task: "):
                await client.get_task("task_1")


def test_cost() -> None:
    assert format_cost(Cost(count=2, money=2, basis="observed")) == "2 uses + ¥2.00"
    assert format_cost(Cost(count=0, money=0, basis="observed")) == "nothing"


def flat_image(width: int, height: int, grey: int = 90) -> bytes:
    return encode_image(Image.new("L", (width, height), grey), "PNG")[1]


def make_svg(attributes: str, inner: str = "") -> bytes:
    return f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}>{inner}</svg>'.encode()


@pytest.mark.parametrize(
    ("kind", "files", "invalid"),
    [
        ("upscale", {"image": SENT["upscale"]}, "image"),
        ("upscale", {"image": flat_image(720, 240)}, "image"),
        ("upscale", {"image": b"<html></html>"}, "image"),
        ("vectorize", {"vector": flat_image(9, 9)}, "vector"),
        ("vectorize", {"vector": make_svg("", '<path d=" "/>')}, "vector"),
        ("vectorize", {"vector": SVG[:-6]}, "vector"),
        ("face-enhance", {"image": SENT["face-enhance"]}, "image"),
        ("face-enhance", {"image": flat_image(240, 100)}, "image"),
        ("seamless", {"image": SENT["seamless"], "grid": flat_image(512, 512)}, "image"),
        ("seamless", {"image": flat_image(64, 64), "grid": flat_image(128, 64)}, "grid"),
        ("seamless", {"image": flat_image(64, 64)}, "grid"),
    ],
)
def test_invalid_results(kind: str, files: dict[str, bytes], invalid: str) -> None:
    results = verify_results(kind, SENT[kind], files)
    assert [result.name for result in results if not result.is_valid] == [invalid]


def test_result_beyond_the_promised() -> None:
    """It passes if it can be decoded."""
    files = {"image": flat_image(720, 480), "vector": SVG}
    extra = CheckResult("vector", (320, 320), "readable", is_valid=True)
    assert verify_results("upscale", SENT["upscale"], files)[1] == extra


def test_unreadable() -> None:
    """A truncated image is invalid although its header is complete, and so is an SVG that declares entities."""
    with pytest.raises(UnreadableError):
        open_image(SENT["upscale"][:-2000])
    bomb = b'<!DOCTYPE svg [<!ENTITY a "aaaa">]><svg xmlns="http://www.w3.org/2000/svg">&a;</svg>'
    with pytest.raises(UnreadableError, match="entities"):
        read_image(bomb)


def test_size_of_drawings() -> None:
    """The size is width and height in pixels, otherwise that of the view box, otherwise unknown."""
    for attributes, size in (
        ('width="319.6px" height="200px"', (320, 200)),
        ('width="100%" height="100%" viewBox="0 0 64 32"', (64, 32)),
        ('width="1.2.3" height="4"', None),
    ):
        assert read_image(make_svg(attributes)).size == size


def test_seams() -> None:
    """The seam is that of the worse direction, and zero if the edges match."""
    ramp = Image.linear_gradient("L")
    assert seam_strength(ramp) > 100
    assert seam_strength(ramp.transpose(Image.Transpose.ROTATE_90)) > 100
    assert seam_strength(tile_mirrored(ramp)) == 0
    assert seam_strength(Image.new("L", (1, 8), 90)) == 0


def test_shipped_images() -> None:
    """Each image is small, suits its kind, and has its origin and licence documented; nothing else is shipped."""
    assert {item.name for item in IMAGES.iterdir()} == {job.image_name for job in JOBS} | {"IMAGES.md"}
    lines = (IMAGES / "IMAGES.md").read_text(encoding="utf-8").splitlines()
    for job in JOBS:
        assert len(job.read_image()) < 120_000
        (line,) = [line for line in lines if line.startswith(f"| `{job.image_name}`")]
        assert (f"`{job.kind}`" in line, "CC0" in line or "public domain" in line) == (True, True)
