"""The provider of OpenTelemetry, which exports spans in a thread with a bounded queue.

Spans that do not fit or can't be sent are dropped. Needs the SDK and the exporter: an optional extra.
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
from opentelemetry.sdk.trace import Span, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, SamplingResult, TraceIdRatioBased
from opentelemetry.semconv.attributes.service_attributes import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION
from opentelemetry.semconv.schemas import Schemas
from opentelemetry.trace import Link, SpanKind, Tracer, TraceState
from opentelemetry.util.types import Attributes

from service import __version__

_log = structlog.get_logger(__name__)

EXPORT_TIMEOUT_SECONDS = 5.0
FLUSH_SECONDS = 5.0
"""How long shutdown waits for the last spans to be sent."""
EXPORT_INTERVAL_SECONDS = 2.0
LOG_INTERVAL_SECONDS = 600.0
MAX_QUEUE_SIZE, MAX_BATCH_SIZE = 4_096, 512
MAX_VALUE_LENGTH = 500
_DEFAULT_PATH = "/v1/traces"


class LinkAwareSampler(TraceIdRatioBased):
    """A sampler by ratio; a linked span was already sampled with its cause."""

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
        if links:
            return ALWAYS_ON.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
        return super().should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)


class RedactingProcessor(SpanProcessor):
    """Redacts names and attributes of spans as they start.

    Values are truncated afterwards: a part of a secret is not recognised. A very long value is not searched as a whole.
    """

    def __init__(self, redact: Callable[[str], str]) -> None:
        self._redact = redact

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002
        span.update_name(self._redact(span.name))
        for name, value in dict(span.attributes or {}).items():
            if isinstance(value, str):
                span.set_attribute(name, self._redact(value[: 4 * MAX_VALUE_LENGTH])[:MAX_VALUE_LENGTH])


def create_provider(sample_ratio: float, redact: Callable[[str], str]) -> TracerProvider:
    """Create a provider that is configured by the gateway's settings.

    OpenTelemetry reads dozens of environment variables, so all limits are set here. Still read from the environment are
    the description of the process (`OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SERVICE_NAME`), which platforms set; the
    credentials of the collector (`OTEL_EXPORTER_OTLP_HEADERS`, `..._CERTIFICATE`, `..._CLIENT_KEY`,
    `..._CLIENT_CERTIFICATE`); and `OTEL_SDK_DISABLED`.
    """
    attributes = {SERVICE_NAME: "imaging-gateway", SERVICE_VERSION: __version__, SERVICE_INSTANCE_ID: str(uuid4())}
    provider = TracerProvider(
        sampler=ParentBased(LinkAwareSampler(sample_ratio)),
        resource=Resource.create(attributes | dict(OTELResourceDetector().detect().attributes)),
        shutdown_on_exit=False,
        span_limits=SpanLimits(
            max_attributes=32,
            max_events=0,
            max_links=1,
            max_span_attributes=32,
            max_event_attributes=0,
            max_link_attributes=0,
            max_attribute_length=SpanLimits.UNSET,
            max_span_attribute_length=SpanLimits.UNSET,
        ),
    )
    provider.add_span_processor(RedactingProcessor(redact))
    return provider


def get_tracer(provider: TracerProvider) -> Tracer:
    return provider.get_tracer("imaging-gateway", __version__, schema_url=Schemas.V1_33_0.value)


@asynccontextmanager
async def open_exporting_tracer(url: str, sample_ratio: float, redact: Callable[[str], str]) -> AsyncIterator[Tracer]:
    """Open a tracer that exports to `url`, by default at the path of OTLP."""
    session = requests.Session()
    session.trust_env = False  # no proxies of the environment, as in all clients here
    exporter = OTLPSpanExporter(
        endpoint=url if urlsplit(url).path else url + _DEFAULT_PATH,
        timeout=EXPORT_TIMEOUT_SECONDS,
        compression=Compression.Gzip,
        session=session,
    )
    provider = create_provider(sample_ratio, redact)
    with _throttle_sdk_logs():
        provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=MAX_QUEUE_SIZE,
                max_export_batch_size=MAX_BATCH_SIZE,
                schedule_delay_millis=EXPORT_INTERVAL_SECONDS * 1000,
                export_timeout_millis=EXPORT_TIMEOUT_SECONDS * 1000,
            )
        )
        try:
            yield get_tracer(provider)
        finally:
            await _shut_down(provider, exporter)


async def _shut_down(provider: TracerProvider, exporter: OTLPSpanExporter) -> None:
    """Send the remaining spans for a while: the provider's own shutdown waits 30 s and can't be shortened."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def shut_down() -> None:
        provider.shutdown()
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=shut_down, daemon=True).start()
    try:
        async with asyncio.timeout(FLUSH_SECONDS):
            await done.wait()
    except TimeoutError:
        _log.warning("tracing.flush_timeout")
        # Ends the retries; the daemon threads do not keep the process alive.
        exporter.shutdown()  # type: ignore[no-untyped-call] # the SDK's own


class _ThrottledHandler(logging.Handler):
    """A handler that repeats a message only after an interval: an unreachable collector causes one per retry."""

    def __init__(self) -> None:
        super().__init__()
        self._quiet_until: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if record.levelno < logging.WARNING or now < self._quiet_until.get(record.msg, now):
            return
        self._quiet_until[record.msg] = now + LOG_INTERVAL_SECONDS
        _log.warning("tracing.export_failed", logger=record.name, detail=record.getMessage())


@contextmanager
def _throttle_sdk_logs() -> Iterator[None]:
    logger, handler = logging.getLogger("opentelemetry"), _ThrottledHandler()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)
