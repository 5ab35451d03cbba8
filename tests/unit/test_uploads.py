"""Reading of uploads: their form, their time limits and their shares of the memory."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import resource
import struct
import threading
import tracemalloc
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import pytest
import uvloop
from hypothesis import example, given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from service.api.errors import BodyTimeout, ClientDisconnected
from service.api.form_parser import MAX_FIELD_BYTES, MAX_FIELDS, MAX_FORM_BYTES, MAX_NAME_CHARS, MultipartForm
from service.api.upload_memory import Allocation, UploadMemory
from service.api.uploads import FORM_OVERHEAD_BYTES, URLENCODED, Upload, UploadReader
from service.domain.errors import (
    GatewayError,
    ImageTooLarge,
    InvalidOptions,
    MalformedRequest,
    Overloaded,
    UnsupportedCoding,
)
from service.domain.media import ImageInfo, Pause, inspect_image, yield_to_threads
from service.memory import release_free_memory
from service.telemetry.gauges import GaugeCollector
from service.usecases.background import cancel_and_wait
from tests.support.images import draw_image, encode_image, make_png
from tests.unit.asgi_client import Message, make_body_messages, make_http_scope, make_receive
from tests.unit.multipart_forms import BOUNDARY, CONTENT_TYPE, encode_field, encode_file, encode_form, encode_part

MAX_BYTES = 50_000
TENANT, OTHER = 4, 7
PART: dict[str, Any] = {"part": "image", "owner": TENANT, "has_digest": True}
PNG = make_png()
JPEG = encode_image(draw_image(), "JPEG")
IMAGE = encode_file("image", PNG)


def make_reader(**limits: Any) -> UploadReader:
    return UploadReader(**({"max_image_bytes": MAX_BYTES, "max_image_pixels": 10_000} | limits))


def make_scope(length: int | None = None, content_type: str = CONTENT_TYPE) -> Any:
    announced = {} if length is None else {"content-length": str(length)}
    return make_http_scope("POST", "/", {"content-type": content_type} | announced)


def split_body(body: bytes, cuts: Iterable[int]) -> list[bytes]:
    """Cut a body into chunks at these offsets; equal offsets make empty chunks."""
    places = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    return [body[start:end] for start, end in itertools.pairwise(places)]


def pad_image(size: int) -> bytes:
    return PNG + b"\0" * (size - len(PNG))


async def read_upload(
    body: bytes,
    *,
    cuts: Iterable[int] = (),
    reader: UploadReader | None = None,
    length: int | None = None,
    owner: int = TENANT,
) -> Upload:
    receive = make_receive(make_body_messages(split_body(body, cuts)))
    part = PART | {"owner": owner}
    async with (reader or make_reader()).receive(make_scope(length), receive, **part) as upload:
        return upload


async def read_form(body: bytes, content_type: str = CONTENT_TYPE, cuts: Iterable[int] = (3,)) -> list[tuple[str, str]]:
    receive = make_receive(make_body_messages(split_body(body, cuts)))
    return await make_reader().read_form(make_scope(content_type=content_type), receive)


def read_gauges(reader: UploadReader) -> dict[str, tuple[float, float]]:
    """Return the reserved bytes and their limit, by pool."""
    gauges = GaugeCollector()
    reader.register_metrics(gauges)
    reserved, limits = gauges.collect()
    pairs = zip(reserved.samples, limits.samples, strict=True)
    return {held.labels["pool"]: (held.value, limit.value) for held, limit in pairs}


async def fail_to_receive() -> Any:
    pytest.fail("the body was read")


PADDINGS = st.tuples(*[st.sampled_from([b"", b" ", b"\t", b" \t  \t "])] * 4)


@given(st.lists(st.integers(0, 1200), max_size=30), st.booleans(), st.permutations(range(3)), PADDINGS)
@example(sorted([*range(1200)] * 2), False, [0, 1, 2], (b" \t ", b"", b"   ", b" "))
async def test_any_chunking_gives_the_same_upload(
    cuts: list[int], announced: bool, order: list[int], paddings: tuple[bytes, ...]
) -> None:
    text = f"a café\r\n--\r\nwith 猫 x--{BOUNDARY} \r\n\r\n --{BOUNDARY}"
    parts = [IMAGE, encode_field("prompt", text), encode_field("scale", "")]
    body = encode_form(*[parts[item] for item in order], paddings=paddings)
    upload = await read_upload(body, cuts=cuts, length=len(body) if announced else None)
    image = upload.image
    assert (image.data, image.sha256) == (PNG, hashlib.sha256(PNG).digest())
    assert (image.media_type, image.width, image.height) == ("image/png", 24, 16)
    assert sorted(upload.fields) == [("prompt", text), ("scale", "")]


async def test_any_file_name_marks_a_file() -> None:
    names = ('filename=""', "filename*=utf-8''%E5%9B%BE.png", 'filename="\xcd\xbc.png"')  # the last one in GBK
    for disposition in ('name="image"', *(f'name="image"; {name}' for name in names)):
        part = encode_part(disposition, PNG, "image/png").replace("\xcd\xbc".encode(), "图".encode("gbk"))
        assert (await read_upload(encode_form(part))).image.data == PNG


async def test_tiny_chunks_take_little_memory() -> None:
    limits: dict[str, Any] = {"max_file_bytes": 100_000, "max_other_bytes": 9_000, "has_digest": True}
    body, form = LARGE, MultipartForm(BOUNDARY, file_part="image", **limits)
    tracemalloc.start()
    try:
        for start in range(0, len(body), 2):
            form.feed(body[start : start + 2])
        assert tracemalloc.get_traced_memory()[0] < 2 * len(body)
    finally:
        tracemalloc.stop()
    form.finish()
    assert form.take_file() == (pad_image(99_000), hashlib.sha256(pad_image(99_000)).digest())


async def test_digest_is_made_only_if_it_is_needed() -> None:
    form = MultipartForm(BOUNDARY, file_part="image", max_file_bytes=9_000, max_other_bytes=9_000, has_digest=False)
    form.feed(SMALL)
    assert form.take_file() == (PNG, b"")


def make_form_with_overhead(size: int) -> bytes:
    """Make a form that has this many bytes beside its file."""
    parts = [IMAGE, *[encode_field("f", "x" * 60_000)] * 4]
    rest = size + len(PNG) - len(encode_form(*parts, encode_field("f", "")))
    return encode_form(*parts, encode_field("f", "x" * rest))


async def test_limits_of_a_form_are_accepted() -> None:
    assert len((await read_upload(make_form_with_overhead(FORM_OVERHEAD_BYTES))).fields) == 5
    many = [encode_field(f"f{number}", "") for number in range(MAX_FIELDS)]
    assert len((await read_upload(encode_form(IMAGE, *many))).fields) == MAX_FIELDS
    largest = ("x" * MAX_NAME_CHARS, "x" * MAX_FIELD_BYTES)
    assert (await read_upload(encode_form(encode_field(*largest), IMAGE))).fields == [largest]
    assert (await read_upload(encode_form(IMAGE), length=MAX_BYTES + FORM_OVERHEAD_BYTES)).image.data == PNG


@pytest.mark.parametrize(
    ("body", "error"),
    [
        *((encode_form(IMAGE, paddings=(padding, b"")), MalformedRequest) for padding in (b"x", b" " * 2_000)),
        (encode_form(IMAGE, IMAGE, paddings=(b"", b" --", b"")), MalformedRequest),
        (encode_form(IMAGE)[:-8], MalformedRequest),
        (b"x" + encode_form(IMAGE), MalformedRequest),
        (encode_form(encode_field("prompt", "x" * (MAX_FIELD_BYTES + 1)), IMAGE), InvalidOptions),
        (encode_form(encode_field("x" * (MAX_NAME_CHARS + 1), "x"), IMAGE), MalformedRequest),
        (encode_form(*[encode_field("f", "")] * (MAX_FIELDS + 1), IMAGE), MalformedRequest),
        (make_form_with_overhead(FORM_OVERHEAD_BYTES + 1), MalformedRequest),
    ],
)
async def test_refused_forms(body: bytes, error: type[GatewayError]) -> None:
    for size in (3, 10_000) if len(body) < 10_000 else (10_000,):
        with pytest.raises(error):
            await read_upload(body, cuts=range(0, len(body), size))


async def test_long_inspections_are_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def inspect_recording(data: bytes, pause: Pause = yield_to_threads) -> ImageInfo:
        info = inspect_image(data, pause)
        threads.append(threading.current_thread())
        return info

    monkeypatch.setattr("service.api.uploads.inspect_image", inspect_recording)
    head, rest = PNG[:33], PNG[33:]
    empty_chunk = struct.pack(">I4sI", 0, b"tEXt", zlib.crc32(b"tEXt"))
    scan = JPEG.replace(b"\xff\xd9", b"\xff\x00" * 400_000 + b"\xff\xd9")
    for image, is_quick in (
        (pad_image(900_000), True),
        (head + empty_chunk * 400 + rest, True),
        (head + empty_chunk * 600 + rest, False),
        (JPEG.replace(b"\xff\xdb", b"\xff\xe0\x00\x02" * 600 + b"\xff\xdb", 1), False),
        (JPEG, True),
        (scan, False),
    ):
        form = encode_form(encode_file("image", image))
        assert (await read_upload(form, reader=make_reader(max_image_bytes=1_000_000))).image.width == 24
        assert (threads.pop() is threading.current_thread(), threads) == (is_quick, [])


@pytest.mark.parametrize(
    ("content_type", "value", "expected"),
    [
        ("application/json", b'{"order": "4711"}', '{"order": "4711"}'),
        ("text/plain; charset=GBK", "猫".encode("gbk"), "猫"),
        ('text/plain; charset="gb18030"', "猫𠀀".encode("gb18030"), "猫𠀀"),
        ("application/json; charset=utf-16", "猫".encode("utf-16"), "猫"),
        ("text/plain; charset=ISO-8859-1", b"caf\xe9", "café"),
        ("text/plain; charset=", b"cat", "cat"),
        # Old Java and C# clients send this.
        ("text/plain\r\nContent-Transfer-Encoding: binary", "猫".encode(), "猫"),
        ("text/plain; charset=unicode_escape", b"cat", None),
        ("text/plain; charset=hex", b"00", None),
        ("text/plain; charset=us-ascii", b"caf\xe9", None),
        ("text/plain\r\nContent-Transfer-Encoding: base64", b"Y2F0", None),
    ],
)
async def test_fields_are_decoded_by_their_charset(content_type: str, value: bytes, expected: str | None) -> None:
    body = encode_form(encode_part('name="prompt"', value, content_type), IMAGE)
    if expected is None:
        with pytest.raises(InvalidOptions, match="prompt"):
            await read_upload(body)
    else:
        assert (await read_upload(body, cuts=range(0, len(body), 7))).fields == [("prompt", expected)]


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ({"content-encoding": "identity, br"}, UnsupportedCoding),
        ({"content-length": str(MAX_BYTES + FORM_OVERHEAD_BYTES + 1)}, ImageTooLarge),
        ({"content-length": "²"}, MalformedRequest),
        ({"content-length": "9" * 20}, MalformedRequest),
    ],
)
async def test_body_is_refused_unread(headers: dict[str, str], error: type[GatewayError]) -> None:
    scope = make_scope()
    sent = {"content-type": CONTENT_TYPE} | headers
    scope["headers"] = [(name.encode(), value.encode("latin-1")) for name, value in sent.items()]
    with pytest.raises(error):
        async with make_reader().receive(scope, fail_to_receive, **PART):
            pass


@given(st.lists(st.integers(0, 300), max_size=5))
async def test_small_form_in_both_encodings(cuts: list[int]) -> None:
    expected = [("user_key", "k +&"), ("task_id", "任务"), ("empty", "")]
    encoded = b"user_key=k+%2B%26&task_id=%E4%BB%BB%E5%8A%A1&empty="
    assert await read_form(encoded, f"{URLENCODED}; charset=utf-8", cuts) == expected
    assert await read_form(encode_form(*[encode_field(*item) for item in expected]), CONTENT_TYPE, cuts) == expected


@pytest.mark.parametrize(
    ("body", "content_type", "error"),
    [
        (b"a=%ff", URLENCODED, MalformedRequest),
        (b"&".join([b"a=b"] * MAX_FIELDS), URLENCODED, None),
        (b"&".join([b"a=b"] * (MAX_FIELDS + 1)), URLENCODED, MalformedRequest),
        (b"a=" + b"x" * (MAX_FORM_BYTES - 2), URLENCODED, None),
        (b"a=" + b"x" * (MAX_FORM_BYTES - 1), URLENCODED, MalformedRequest),
        (encode_form(*[encode_field("f", "x" * 40_000)] * 2), CONTENT_TYPE, MalformedRequest),
    ],
)
async def test_limits_of_a_small_form(body: bytes, content_type: str, error: type[GatewayError] | None) -> None:
    with pytest.raises(error) if error else nullcontext():
        assert await read_form(body, content_type)


class LoopClock:
    """The time of the event loop, which stands still until it is advanced."""

    def __init__(self) -> None:
        self.now = asyncio.get_running_loop().time()

    async def advance(self, seconds: float) -> None:
        await run_until_idle()
        self.now += seconds
        await run_until_idle()

    def slow_down(self, chunks: Iterable[bytes], seconds: float) -> Any:
        """Make a `receive` that returns each chunk after this time."""
        receive_next = make_receive(make_body_messages(chunks))

        async def receive() -> Message:
            await self.advance(seconds)
            message: Message = await receive_next()
            return message

        return receive


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LoopClock]:
    loop_clock = LoopClock()
    with monkeypatch.context() as patched:
        patched.setattr(asyncio.get_running_loop(), "time", lambda: loop_clock.now)
        yield loop_clock


async def run_until_idle() -> None:
    """Run the loop until every task waits for the test."""
    for _ in range(20):
        await asyncio.sleep(0)


LARGE = encode_form(encode_file("image", pad_image(99_000)))
SMALL = encode_form(IMAGE)
TIME_LIMITS = {"idle_seconds": 10, "total_seconds": 60, "grace_seconds": 5, "min_bytes_per_second": 2_000}


@pytest.mark.parametrize(
    ("body", "is_announced", "pauses", "in_time"),
    [
        (SMALL, True, [10.1], False),  # idle
        (SMALL, True, [5.4] * 10, True),
        (SMALL, True, [5.5] * 10, False),  # in total, with the pause before the end
        (SMALL, False, [1.0] * 10, False),  # too slow, and not known to be small
        (LARGE, True, [4.9] * 10, True),
        (LARGE, True, [4.98] * 10, False),  # too slow for the tenth part
        (LARGE, True, [5.1], False),  # nothing within the grace period
        (LARGE, True, [0.1] * 600, False),  # in total
    ],
)
async def test_body_must_arrive_in_time(
    clock: LoopClock, body: bytes, is_announced: bool, pauses: list[float], in_time: bool
) -> None:
    size = -(-len(body) // len(pauses))
    receive = clock.slow_down(split_body(body, range(size, len(body), size)), pauses[0])
    reader = make_reader(max_image_bytes=100_000, **TIME_LIMITS)
    with nullcontext() if in_time else pytest.raises(BodyTimeout):
        async with reader.receive(make_scope(len(body) if is_announced else None), receive, **PART) as upload:
            assert upload.image.width == 24


def test_time_limit_below_a_millisecond() -> None:
    messages = iter(make_body_messages(split_body(SMALL, [9, 99, 199]))[:3])

    async def receive() -> Any:
        return next(messages, None) or await asyncio.get_running_loop().create_future()

    async def read() -> None:
        async with make_reader(idle_seconds=0.0001).receive(make_scope(), receive, **PART):
            pytest.fail("the body never ends")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, pytest.raises(BodyTimeout):
        runner.run(read())


async def test_small_form_needs_no_rate(clock: LoopClock) -> None:
    reader = make_reader(**TIME_LIMITS)
    receive = clock.slow_down(split_body(b"task_id=12345", range(1, 13, 2)), 6)
    assert await reader.read_form(make_scope(content_type=URLENCODED), receive) == [("task_id", "12345")]


async def test_waiting_for_memory(clock: LoopClock) -> None:
    reader = make_reader(max_image_bytes=100_000, memory_bytes=110_000, wait_seconds=100, **TIME_LIMITS)

    async def hold(hold_seconds: float) -> asyncio.Task[Upload]:
        """Let another upload wait while one holds the memory."""
        receive = make_receive(make_body_messages([LARGE]))
        async with reader.receive(make_scope(), receive, **PART):
            assert read_gauges(reader)["tenants"] == (len(LARGE), 110_000)
            waiting = asyncio.create_task(read_upload(LARGE, reader=reader, length=len(LARGE), owner=OTHER))
            await clock.advance(hold_seconds)
            return waiting

    # The wait does not count as time of the client.
    assert (await (await hold(99))).image.width == 24
    with pytest.raises(Overloaded) as refused:
        await (await hold(101))
    assert refused.value.retry_after == 100
    assert read_gauges(reader)["tenants"] == (0, 110_000)


async def test_memory_before_and_after_the_key() -> None:
    """A caller counts as unknown until its key arrives, and a small form not at all."""
    key, image = encode_field("user_key", "x"), encode_file("image", pad_image(99_000))

    def identify(name: str, _: str) -> int | None:
        return TENANT if name == "user_key" else None

    def record_memory(reader: UploadReader, receive: Any, held: list[tuple[float, ...]]) -> Any:
        """Make a `receive` that records the memory that is held before each chunk."""

        async def receive_recording() -> Any:
            held.append(tuple(reserved for reserved, _ in read_gauges(reader).values()))
            return await receive()

        return receive_recording

    for body, cuts, expected in (
        (encode_form(key, image), [len(encode_form(key))], [(0, 0), (1, 0), (1, 0)]),
        (encode_form(image, key), [MAX_FORM_BYTES, 70_000], [(0, 0), (0, 0), (0, 1), (1, 0)]),
    ):
        reader, held = make_reader(max_image_bytes=100_000), list[tuple[float, ...]]()
        receive = record_memory(reader, make_receive(make_body_messages(split_body(body, cuts))), held)
        unknown_part, scope = PART | {"owner": None}, make_scope(len(body))
        async with reader.receive(scope, receive, **unknown_part, identify=identify) as upload:
            assert upload.image.width == 24
        assert held == [(len(body) * tenants, len(body) * unknown) for tenants, unknown in expected]
        assert [reserved for reserved, _ in read_gauges(reader).values()] == [0, 0]


async def test_every_failure_releases_the_memory(clock: LoopClock) -> None:
    reader = make_reader()

    async def upload(messages: Sequence[Message], *, stay_open: bool) -> None:
        async with reader.receive(make_scope(), make_receive(messages, stay_open=stay_open), **PART):
            assert read_gauges(reader)["tenants"][0] == len(SMALL)
            raise ZeroDivisionError

    for messages, stay_open, error in (
        (make_body_messages([SMALL[:-9]]), False, MalformedRequest),
        (make_body_messages([SMALL[:99]])[:-1], True, BodyTimeout),
        (make_body_messages([SMALL[:99]])[:-1], False, ClientDisconnected),
        (make_body_messages([SMALL]), False, ZeroDivisionError),
    ):
        uploading = asyncio.create_task(upload(messages, stay_open=stay_open))
        await clock.advance(11)
        with pytest.raises(error):
            await uploading
        assert read_gauges(reader)["tenants"][0] == 0


async def test_fault_while_releasing_does_not_fail_an_accepted_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: UploadMemory) -> None:
        raise ZeroDivisionError

    with capture_logs() as events:
        async with make_reader().receive(make_scope(), make_receive(make_body_messages([SMALL])), **PART):
            monkeypatch.setattr(UploadMemory, "_grant_waiting", fail)
    assert [event["event"] for event in events] == ["upload.cleanup_error"]


A, B, C, D = range(1, 5)
REQUESTS = st.lists(st.tuples(st.none() | st.integers(A, D), st.integers(0, 12)), max_size=12)


def request_all(requests: Sequence[tuple[int | None, int]], **limits: Any) -> tuple[UploadMemory, list[Allocation]]:
    """Request memory for uploads (owner, size) of a memory of ten, with shares of four."""
    memory = UploadMemory(10, share_bytes=4, unknown_bytes=4, wait_seconds=60, **limits)
    return memory, [memory.request(*request) for request in requests]


@pytest.mark.parametrize(
    ("requests", "granted", "ended", "then"),
    [
        ([(A, 3), (A, 2), (B, 4)], [0, 2], 0, [1, 2]),  # beyond the share of A
        ([(A, 3), (A, 4), (A, 1)], [0], 0, [1]),
        ([(A, 4), (B, 4), (C, 4), (D, 1)], [0, 1], 0, [1, 2, 3]),  # a small upload does not overtake
        ([(A, 4), (B, 4), (C, 4), (D, 1)], [0, 1], 2, [0, 1, 3]),  # C gives up
        ([(A, 4), (B, 4), (C, 4), (None, 3), (None, 3), (None, 1)], [0, 1, 3], 0, [1, 2, 3]),
        ([(None, 3), (None, 3), (A, 4), (B, 4)], [0, 2, 3], 0, [1, 2, 3]),
        ([(A, 90), (A, 1), (B, 1)], [0, 2], 0, [1, 2]),  # larger than all memory
    ],
)
async def test_order_of_uploads(
    requests: Sequence[tuple[int | None, int]], granted: Sequence[int], ended: int, then: Sequence[int]
) -> None:
    memory, uploads = request_all(requests)
    assert [number for number, upload in enumerate(uploads) if upload.grant.done()] == granted
    memory.shrink(uploads[ended], 0)
    held = [number for number, upload in enumerate(uploads) if number != ended and upload.grant.done()]
    assert held == then


@given(REQUESTS, st.randoms(use_true_random=False))
async def test_every_upload_is_granted_within_the_shares(
    requests: Sequence[tuple[int | None, int]], random: Random
) -> None:
    memory, uploads = request_all(requests)
    while uploads:
        held = Counter[int | None]()
        for upload in uploads:
            held[upload.owner] += upload.size_bytes if upload.grant.done() else 0
        assert all(size <= 4 for size in held.values())
        assert held.total() - held[None] <= 10
        ended = random.choice([upload for upload in uploads if upload.grant.done()])
        memory.shrink(ended, 0)
        uploads.remove(ended)
    assert set(memory.reserved_bytes.values()) == {0}


async def test_number_of_submissions() -> None:
    """No upload begins while so many are under way, and those of tenants with their share of them come last."""
    memory, (*submissions, _) = request_all([(A, 1), (A, 1), (C, 4)], max_submissions=2, share=0.5)
    for submission in submissions:
        memory.shrink(submission, 1)  # the whole body has arrived
    waiting = [memory.request(*request) for request in ((A, 2), (B, 4), (None, 1))]
    assert [upload.grant.done() for upload in waiting] == [False, False, True]
    memory.shrink(submissions[0], 0)
    assert [upload.grant.done() for upload in waiting] == [False, True, True]
    memory.shrink(submissions[1], 0)
    assert waiting[0].grant.done()


async def test_number_of_uploads_that_wait() -> None:
    memory, uploads = request_all([(A, 4), *[(A, 1)] * 2], max_waiting=4, share=0.5)
    with pytest.raises(Overloaded):
        memory.request(A, 1)  # beyond its share
    uploads += [memory.request(B, 6) for _ in range(3)]  # the first is granted at once
    uploads.append(memory.request(C, 4))
    with pytest.raises(Overloaded):
        memory.request(C, 1)  # too many wait
    for upload in uploads:
        memory.shrink(upload, 0)
    assert memory.request(A, 1).grant.done()


async def test_queue_that_does_not_end(clock: LoopClock) -> None:
    memory, (active, *waiting) = request_all([(A, 4)] * 3, queue_seconds=1)
    await clock.advance(0.9)
    waiting.append(memory.request(A, 4))
    await clock.advance(0.2)
    with pytest.raises(Overloaded):
        memory.request(A, 4)
    assert memory.request(B, 4).grant.done()
    for upload in (active, *waiting[:2]):
        memory.shrink(upload, 0)
    assert not memory.request(A, 4).grant.done()  # behind one that has not waited for long


async def test_free_memory_is_returned_after_a_burst(clock: LoopClock, monkeypatch: pytest.MonkeyPatch) -> None:
    began_at, released_at = clock.now, list[float]()
    monkeypatch.setattr(
        "service.api.upload_memory.release_free_memory", lambda: released_at.append(clock.now - began_at)
    )
    memory, _ = request_all([])
    for size in (3, 3, 2):  # the last is too small for a burst
        memory.shrink(memory.request(A, size), 0)
        await clock.advance(4)
    assert released_at == [12]


def test_memory_is_returned_also_from_within_the_heap() -> None:
    def read_resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    parts = [b"x" * 100_000 for _ in range(500)]
    before = read_resident_bytes()
    del parts[:-1]
    release_free_memory()
    assert before - read_resident_bytes() > 40_000_000


async def test_one_upload_begins_at_a_time() -> None:
    reader, began = make_reader(), 0

    async def receive() -> Any:
        nonlocal began
        began += 1
        return await asyncio.get_running_loop().create_future()

    async def upload() -> None:
        async with reader.receive(make_scope(len(SMALL)), receive, **PART):
            pytest.fail("the body never arrives")

    uploading, counts = [asyncio.create_task(upload()) for _ in range(5)], [0]
    while counts[-1] < len(uploading):
        await asyncio.sleep(0)
        counts.append(began)
    assert max(after - before for before, after in itertools.pairwise(counts)) == 1
    await cancel_and_wait(uploading)
