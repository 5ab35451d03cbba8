"""Sending what was recorded to a collector, by OTLP over HTTP.

All of it happens beside the gateway's work: a thread sends what is queued, the queue is bounded, and what does not fit
or can't be sent is lost. A collector that is away costs some memory and a line in the log now and then.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from urllib.parse import urlsplit
from uuid import uuid4

import requests
import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, SamplingResult, TraceIdRatioBased
from opentelemetry.semconv.attributes.service_attributes import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes

from service import __version__
from service.telemetry.otel.spans import OtelTracer

_log = structlog.get_logger(__name__)

SEND_SECONDS = 5.0
"""How long it is tried to send a batch."""
FLUSH_SECONDS = 5.0
"""How long the end of the process waits for what was recorded last to be sent."""
EVERY_SECONDS = 2.0
SAID_AGAIN_SECONDS = 600.0
QUEUED, BATCH = 4_096, 512
LONGEST_VALUE = 500

_PATH = "/v1/traces"


class Share(TraceIdRatioBased):
    """Chooses, of what no client traces, a share of the requests, and with them whatever follows from those."""

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """What is linked was chosen with its cause."""
        if links:
            return ALWAYS_ON.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
        return super().should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)


def provider(share: float) -> TracerProvider:
    """What spans are made with.

    OpenTelemetry reads some dozens of environment variables by itself. What is recorded, how much of it, and where it
    is sent is up to the gateway's own settings, so all of these are given. Left to the environment is what describes
    the process (`OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SERVICE_NAME`), since platforms set that; how to be let in by the
    collector (`OTEL_EXPORTER_OTLP_HEADERS`, `..._CERTIFICATE`, `..._CLIENT_KEY`, `..._CLIENT_CERTIFICATE`), since these
    are the names under which such secrets are handed out; and `OTEL_SDK_DISABLED`, which turns all of it off.
    """
    own = {SERVICE_NAME: "imaging-gateway", SERVICE_VERSION: __version__, SERVICE_INSTANCE_ID: str(uuid4())}
    return TracerProvider(
        sampler=ParentBased(Share(share)),
        resource=Resource.create(own | dict(OTELResourceDetector().detect().attributes)),
        shutdown_on_exit=False,
        span_limits=SpanLimits(
            max_attributes=32,
            max_events=0,
            max_links=1,
            max_span_attributes=32,
            max_event_attributes=0,
            max_link_attributes=0,
            max_attribute_length=LONGEST_VALUE,
            max_span_attribute_length=LONGEST_VALUE,
        ),
    )


@asynccontextmanager
async def exporting(url: str, share: float, clean: Callable[[str], str]) -> AsyncIterator[OtelTracer]:
    """A tracer whose spans are sent to a collector. What was recorded last is sent as the block ends, if that is quick.

    An address without a path stands for the one that collectors have by default.
    """
    session = requests.Session()
    session.trust_env = False  # as in all of the gateway, the proxies of the environment are for others
    exporter = OTLPSpanExporter(
        endpoint=url if urlsplit(url).path else url + _PATH,
        timeout=SEND_SECONDS,
        compression=Compression.Gzip,
        session=session,
    )
    spans = provider(share)
    with _seldom_heard():
        spans.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=QUEUED,
                max_export_batch_size=BATCH,
                schedule_delay_millis=EVERY_SECONDS * 1000,
                export_timeout_millis=SEND_SECONDS * 1000,
            )
        )
        try:
            yield OtelTracer(spans, clean)
        finally:
            await _ended(spans, exporter)


async def _ended(spans: TracerProvider, exporter: OTLPSpanExporter) -> None:
    """Send what is left, for a while. The provider's own end waits for half a minute, and nothing can shorten that."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def end() -> None:
        spans.shutdown()
        with suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=end, daemon=True).start()
    try:
        async with asyncio.timeout(FLUSH_SECONDS):
            await done.wait()
    except TimeoutError:
        _log.warning("traces.cut-short")
        # Ends its tries; the threads are daemons, which hold no process up.
        exporter.shutdown()  # type: ignore[no-untyped-call] # the SDK's own


class _Seldom(logging.Handler):
    """Says each sort of message once in a while: without a collector there is one for every batch and every try."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if record.levelno < logging.WARNING or now < self._said.get(record.msg, now):
            return
        self._said[record.msg] = now + SAID_AGAIN_SECONDS
        _log.warning("traces.troubled", logger=record.name, detail=record.getMessage())


@contextmanager
def _seldom_heard() -> Iterator[None]:
    """Let OpenTelemetry log no more than it must."""
    logger, seldom = logging.getLogger("opentelemetry"), _Seldom()
    logger.addHandler(seldom)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(seldom)
